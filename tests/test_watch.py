"""benchmarks/watch.py: it evaluates as training does, films what happens, refuses in one line."""

import os
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pandas as pd
import pytest
import torch
import watch
from helpers_run import ROOT, folder_of, listing, one_error, read_checkpoint, small
from helpers_tools import call

import mbpo_ftfl


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of a model-based script, evaluated where it is saved."""
    root = tmp_path_factory.mktemp("runs")
    mbpo_ftfl.train(mbpo_ftfl.Args(**small("mbpo_ftfl", run_root=str(root), eval_episodes=3)))
    return folder_of(root, "mbpo_ftfl")


def test_it_evaluates_and_films_as_training_did(trained, tmp_path):
    """All returns of the last evaluation come again, each episode in a film that moves."""
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    probed = subprocess.run([sys.executable, "-c", probe], env=env | {"MUJOCO_GL": "egl"})
    if probed.returncode:
        pytest.skip("nothing can be rendered here")
    command = [sys.executable, ROOT / "benchmarks/watch.py", trained, "--video", tmp_path]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    returns = [float(line.split()[-1]) for line in child.stdout.splitlines() if "episode" in line]
    step, *numbers = (trained / "eval.csv").read_text().splitlines()[-1].split(",")
    assert int(step) == read_checkpoint(trained)["progress"][0]
    measured = [f(returns) for f in (np.mean, np.std, min, max, len)]
    assert measured == pytest.approx([float(number) for number in numbers[:5]], abs=0.01)
    for i, film in enumerate(sorted(tmp_path.glob("*.mp4"))):
        frames = imageio.imread(film)
        assert len(frames) == pytest.approx(returns[i] + 2, abs=1)  # a step that falls gives 0
        assert frames[0].tobytes() != frames[-1].tobytes()
    assert len([*tmp_path.glob("*.mp4")]) == 3


@pytest.mark.parametrize("seed", [None, 7])
def test_a_seed_gives_other_episodes(trained, tmp_path, monkeypatch, seed):
    """Episodes start where the given seed says, or as those of training's evaluation."""
    seeds, make_env = [], mbpo_ftfl.make_env

    class Filmed(watch.gym.Wrapper):
        def reset(self, **kwargs):
            seeds.append(kwargs["seed"])
            return self.env.reset(**kwargs)

    monkeypatch.setattr(watch.gym.wrappers, "RecordVideo", lambda env, *_, **how: Filmed(env))
    monkeypatch.setattr(mbpo_ftfl, "make_env", lambda env_id, render: make_env(env_id))
    words = [] if seed is None else ["--seed", seed]
    code, _, err = call(watch.watch, watch.Options, trained, "--episodes", 2, *words)
    assert code == 0, err
    assert seeds == [mbpo_ftfl.derive_seed(seed or 1, 1, 80, episode) for episode in range(2)]


@pytest.mark.parametrize("falls_at", [None, 2])
def test_it_asks_the_model(trained, tmp_path, monkeypatch, falls_at):
    """Of every window: its reward, and the median of rollouts from its first state to their end."""
    asked, model_step = [], mbpo_ftfl.model_step

    def known(model, actor, obs, choice, noise, nets, args):
        """A model in which branch i earns i at every step, and stays or falls at once or later."""
        asked.append((obs.clone(), noise[0], choice))
        action, next_obs, reward = model_step(model, actor, obs, choice, noise, nets, args)
        assert next_obs.shape == obs.shape
        fallen = torch.full_like(obs, 0.0 if len(asked) % 4 != falls_at else 1.0)  # rad
        return action, fallen, torch.arange(len(reward)).float()

    monkeypatch.setattr(mbpo_ftfl, "model_step", known)
    words = trained, "--ahead", 4, "--video", tmp_path / "new"
    code, out, err = call(watch.watch, watch.Options, *words)
    assert code == 0, err
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ahead.csv"]
    table = pd.read_csv(tmp_path / "new/ahead.csv")
    returns = [float(line.split()[-1]) for line in out.splitlines() if "episode" in line]
    assert table.groupby("episode").real.sum().tolist() == pytest.approx(returns, abs=0.01)
    lengths = [int(value) + 1 for value in returns]  # the step that falls gives 0
    starts = [(i, step) for i, n in enumerate(lengths) for step in range(0, n, 4)]
    assert [*zip(table.episode, table.step, strict=True)] == starts
    assert {*table.model} == {49 * (falls_at or 4)}  # the last window as well, though it is short
    assert len(asked) == 4 * len(table)
    assert {noise for _, noise, _ in asked} == {0.0}
    assert {len(obs) for obs, *_ in asked} == {100}
    assert len({*torch.cat([choice for *_, choice in asked]).tolist()}) > 1
    first = torch.stack([obs[0] for obs, *_ in asked[::4]])
    assert all((obs == obs[0]).all() for obs, *_ in asked)
    assert len(first.unique(dim=0)) == len(table)
    assert (asked[1][0] == 0).all()  # goes on from what the model said


BAD = [  # what is made of the run's folder, flags, and what the line must say
    (None, "", "holds no checkpoint.pt"),
    (b"no checkpoint", "", "checkpoint.pt is damaged or cut short"),
    ({"agent": {}}, "", "checkpoint.pt is damaged or cut short"),
    ("other.py", "", "was written by other.py, which is not in"),
    ("sac.py", "", "is of another version of sac.py"),
    (None, "--episodes 0", "--episodes must be at least 1"),
    (None, "--episodes x", "invalid"),
    (None, "--ahead -1", "and --seed and --ahead 0 or more"),
    ({"model": {"learner": {}}}, "--ahead 5", "has no fitted model to ask"),
]


@pytest.mark.parametrize(("content", "words", "said"), BAD)
def test_bad_input_is_one_line(trained, tmp_path, monkeypatch, content, words, said):
    """Exit code 2, and nothing is written."""
    make_env = watch.load_script("sac.py").make_env
    monkeypatch.setattr(watch.load_script("sac.py"), "make_env", lambda e, render: make_env(e))
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    elif content and "model" in content:  # saved before the first fit
        torch.save(read_checkpoint(trained) | content, tmp_path / "checkpoint.pt")
    elif content:
        if isinstance(content, str):  # as if another script had written it
            saved = read_checkpoint(trained)
            saved["agent"]["actor"]["params"].popitem()
            content = saved | {"settings": saved["settings"] | {"script": content}}
        torch.save(content, tmp_path / "checkpoint.pt")
    before = listing(tmp_path)
    code, out, err = call(watch.watch, watch.Options, tmp_path, *words.split())
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert listing(tmp_path) == before
