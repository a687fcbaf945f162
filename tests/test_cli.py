"""The command line, what a run writes, and what is told of it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers_run import (
    ROOT,
    SCRIPTS,
    Outcome,
    fields,
    flags,
    folder_of,
    one_error,
    read_evaluations,
    read_scalars,
    same,
    small,
)

import mbpo
import mbpo_residual_ablation
import sac

OTHER = "mps" if torch.cuda.is_available() else "cuda"  # a device that is not here

BAD = [  # flags, and what the line must say
    (sac, "--env-id dmc/walker-rum", "did you mean dmc/walker-run"),
    (sac, "--env-id environments:Plane-v0", "did you mean environments:Plain-v0"),
    (sac, "--env-id no_such_module:Point-v0", "No module named 'no_such_module'"),
    (sac, "--total-timesteps 39", "--total-timesteps must be at least --learning-starts, not 39"),
    (sac, "--eval-frequency -1", "--eval-frequency must be 0 or more, not -1"),
    (sac, "--gamma nan", "--gamma must be above 0 and at most 1, not nan"),
    (sac, "--target-entropy nan", "--target-entropy must be a finite number, not nan"),
    (sac, "--seed -1", "--seed must be from 0 to 2^63 - 1, not -1"),
    (sac, f"--device {OTHER}", "--device must be one that is here (c"),
    (sac, "--buffer-size 1000000000000", "replay buffers need"),
    (sac, "--run-root {root}/file/below", "--run-root {root}/file/below can't be written: "),
    (mbpo, "--num-elites 9", "--num-elites must be at most --ensemble-size, not 9"),
    (mbpo, "--model-patience 0", "--model-patience must be at least 1, not 0"),
    (mbpo, "--real-ratio 1", "--real-ratio must be at least 0 and below 1, not 1.0"),
    (mbpo, "--batch-size 16", "--batch-size must be at least 1 / --real-ratio, not 16"),
    (mbpo, "--learning-starts 4", "--learning-starts must be at least 1 / --holdout-ratio, not 4"),
    (mbpo, "--buffer-size 4", "--buffer-size must be at least 1 / --holdout-ratio, not 4"),
    (mbpo, "--rollout-schedule 10 5 1 1", "--rollout-schedule must be START END FROM TO, with"),
    (mbpo, "--rollouts-per-step 1000000000", "replay buffers need"),
    (mbpo, "--env-id HumanoidStandup-v5", "--never-terminates"),
]


@pytest.mark.parametrize(("script", "words", "said"), BAD)
def test_bad_input_is_one_line(script, words, said, refused, tmp_path):
    """What can't be done ends before anything is written, with a line that says why."""
    (tmp_path / "file").write_text("in the way")
    words, said = (text.replace("{root}", str(tmp_path)) for text in (words, said))
    assert said in refused(script, [*flags(small(script.__name__)), *words.split()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": True}, "--seed must be of type int, not True"),
        ({"model_patience": 2.5}, "--model-patience must be of type"),
        ({"precision": "half"}, "--precision must be exact or fast, not 'half'"),
        ({"rollout_schedule": (0, 1, 1, "2")}, "--rollout-schedule must be"),
    ],
)
def test_a_value_of_another_type_is_refused(changes, said, tmp_path):
    """From Python, where nothing is read from words, settings are checked, too."""
    with pytest.raises(mbpo.InputError, match=said):
        mbpo.train(mbpo.Args(**small("mbpo", run_root=str(tmp_path)) | changes))
    assert not list(tmp_path.iterdir())


def test_numbers_in_scientific_notation(done, tmp_path):
    """1e2 is 100 for whole numbers; all other words stay as they are."""
    words = flags(small("sac", exp_name="of1e2", total_timesteps="1e2", learning_starts="4e1"))
    done(sac, [*words, "--alpha", "1.5e1", "--q-lr=3e-4", "--buffer-size=1e3"])
    held = json.loads((folder_of(tmp_path, "of1e2") / "args.json").read_text())
    given = {"total_timesteps": 100, "learning_starts": 40, "buffer_size": 1000}
    assert held == held | given | {"alpha": 15, "q_lr": 3e-4, "exp_name": "of1e2"}


def test_what_is_missing_is_named(refused, monkeypatch, tmp_path):
    """--capture-video needs moviepy, --track wandb, dm_control OpenGL, --compile a compiler."""
    find, words = importlib.util.find_spec, flags(small("sac"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda x, *y: x != "moviepy" and find(x, *y))
    assert "pip install moviepy" in refused(sac, [*words, "--capture-video"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(sac, [*words, "--track"])
    for settings, env, said in [
        ({"env_id": "dmc/cartpole-balance"}, {"MUJOCO_GL": "osmesa"}, "apt install libegl1"),
        ({"compile": True}, {"CXX": str(tmp_path / "none")}, "mend it or give --no-compile"),
    ]:
        words = flags(small("sac", run_root=str(tmp_path / "runs")) | settings)
        command, env = [sys.executable, ROOT / "sac.py", *words], os.environ | env
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (child.returncode, child.stdout) == (2, "")
        assert one_error(child.stderr).endswith(said)
    assert not list(tmp_path.iterdir())


def test_a_task_of_ones_own(tmp_path):
    """A module beside the script registers a task, by an id that the scripts don't know."""
    shutil.copy(ROOT / "tests" / "environments.py", tmp_path / "my_env.py")
    shutil.copy(ROOT / "mbpo.py", tmp_path)
    words = [*flags(small("mbpo", env_id="my_env:Plain-v0")), "--never-terminates"]
    command = [sys.executable, "mbpo.py", *words]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    folder = folder_of(tmp_path / "runs", "mbpo", "my_env:Plain-v0")
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80"]


def test_scripts_share_defaults():
    """A flag's default is the same in all scripts, but for updates per step, and the name."""
    base, model, ablation = map(fields, (sac, mbpo, mbpo_residual_ablation))
    assert ablation | model | {"exp_name": ablation["exp_name"]} == ablation
    differing = {name for name in base if base[name] != model[name]}
    assert differing == {"updates_per_step", "exp_name"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small run of a script that all flags are flipped from, made once."""
    made = {}

    def of(script) -> Outcome:
        name = script.__name__
        if name not in made:
            made[name] = Outcome(script, small(name, run_root=str(tmp_path_factory.mktemp(name))))
        return made[name]

    return of


def learns_otherwise(new, old):
    return not same(new.agent, old.agent) and len(new.rows) == len(old.rows)


def models_otherwise(new, old):
    return not same(new.learner["params"], old.learner["params"])


FLIPPED = {  # of each flag: another value, and what must hold of the new and the old run
    "env_id": ("Hopper-v5", lambda new, old: new.rows.shape[1] == 11 + 3 + 1 + 11 + 1),
    "seed": (
        np.int64(2),
        lambda new, old: new.folder.name[-3:] == "__2" and learns_otherwise(new, old),
    ),
    "total_timesteps": (70, lambda new, old: new.evaluations[-1][0] == str(new.step) == "70"),
    "learning_starts": (50, learns_otherwise),
    "updates_per_step": (2, lambda new, old: new.updates == 2 * old.updates == 2 * 41),
    "batch_size": (20, learns_otherwise),
    "gamma": (0.5, learns_otherwise),
    "tau": (0.5, learns_otherwise),
    "policy_lr": (np.float32(1e-2), learns_otherwise),
    "q_lr": (1e-2, learns_otherwise),
    "autotune": (False, lambda new, old: new.agent["log_alpha"]["params"] == 0),
    "alpha": (0.5, learns_otherwise),
    "target_entropy": (3.0, learns_otherwise),
    "buffer_size": (50, lambda new, old: new.saved["buffer"]["added"] == 80 > len(new.rows) == 50),
    "eval_frequency": (20, lambda new, old: [x[0] for x in new.evaluations][1:3] == ["20", "40"]),
    "eval_episodes": (3, lambda new, old: {x[-1] for x in new.evaluations} == {"3"}),
    "checkpoint_frequency": (0, lambda new, old: new.saved is None),
    "run_root": (None, lambda new, old: new.folder.parent != old.folder.parent),
    "exp_name": ("other", lambda new, old: "v5__other__1" in new.folder.name),
    "device": ("cpu", lambda new, old: same(new.agent, old.agent)),
    "precision": ("fast", lambda new, old: new.precision == "medium"),
    "resume": (True, lambda new, old: same(new.agent, old.agent)),
    "ensemble_size": (4, lambda new, old: len(new.learner["m"]["layers"][0][0]) == 4),
    "num_elites": (3, lambda new, old: len(new.model["elites"]) == 3),
    "model_hidden": (24, lambda new, old: new.learner["m"]["layers"][1][0].shape == (3, 24, 24)),
    "model_lr": (1e-2, models_otherwise),
    "model_beta": (0.5, models_otherwise),
    "model_train_frequency": (15, lambda new, old: new.fitted == 30 + 5 + 5 > old.fitted == 30),
    "model_first_updates": (3, lambda new, old: new.fitted == 3),
    "model_updates": (7, lambda new, old: new.fitted == 30 + 7 + 7),
    "model_patience": (1, lambda new, old: new.fitted not in (0, 30)),
    "holdout_ratio": (0.5, models_otherwise),
    "rollouts_per_step": (5, lambda new, old: len(new.synthetic) == 41 * 5),
    "rollout_schedule": ((0, 1, 1, 2), lambda new, old: len(new.synthetic) > 41 * 10),
    "real_ratio": (0.5, learns_otherwise),
    "never_terminates": (True, lambda new, old: new.synthetic[:, -1].sum() == 0),
    "normalize_targets": (False, lambda new, old: "targets" in old.model.keys() - new.model.keys()),
    "predict_residual": (False, models_otherwise),
}
ALSO = {  # what must change with a flag
    "run_root": {},
    "model_updates": {"model_train_frequency": 20},
    "never_terminates": {"env_id": "Pendulum-v1"},
}


def test_every_flag_has_a_test():
    """The table, and the tests elsewhere, are about all flags."""
    elsewhere = {"compile", "track", "capture_video"}
    assert {*FLIPPED, *elsewhere} == {name for each in SCRIPTS for name in fields(each)}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flag_does_what_it_says(name, base, tmp_path):
    """With one flag flipped a run ends, and differs from the base run as the flag says."""
    value, holds = FLIPPED[name]
    script = next(s for s in (sac, mbpo, mbpo_residual_ablation) if name in fields(s))
    changes = {name: value} | ALSO.get(name, {}) | {"run_root": tmp_path}  # a Path is taken, too
    assert holds(Outcome(script, small(script.__name__, **changes)), base(script))


def test_updates_mix_real_and_synthetic_transitions(tmp_path, monkeypatch):
    """Each on a batch of its own: the share --real-ratio is real, rounded down, the rest made."""
    drawn, sample = [], mbpo.ReplayBuffer.sample

    def noted(buffer, *shape, generator):
        rows = sample(buffer, *shape, generator=generator)
        drawn.append(((len(buffer.rows), *shape), rows))
        return rows

    monkeypatch.setattr(mbpo.ReplayBuffer, "sample", noted)
    batches, update = [], mbpo.sac_update
    monkeypatch.setattr(mbpo, "sac_update", lambda *x: (batches.append(x[1].obs), update(*x))[1])
    changes = {"buffer_size": 500, "batch_size": 50, "updates_per_step": 3, "total_timesteps": 40}
    mbpo.train(mbpo.Args(**small("mbpo", run_root=str(tmp_path), **changes)))
    assert [size for size, _ in drawn] == [(500, 10), (500, 3, 2), (1000 * 10, 3, 48)]
    expected = torch.cat([rows[..., :4] for _, rows in drawn[1:]], 1)
    assert torch.equal(torch.stack(batches), expected)


def test_actions_are_random_at_first_and_then_sampled(tmp_path):
    """Uniform up to --learning-starts, later by the policy, which this run does not change."""
    changes = {"total_timesteps": 540, "policy_lr": 1e-12, "run_root": str(tmp_path)}
    outcome = Outcome(sac, small("sac", **changes))
    obs, action = outcome.rows[:, :4], outcome.rows[:, 4:5]
    mean, log_std = sac.actor(outcome.agent["actor"]["params"], obs)
    unit = (torch.atanh(action) - mean) / log_std.exp()
    assert unit[:40].abs().median() > 5
    assert abs(unit[40:].std() - 1) < 0.2


@pytest.mark.parametrize(("name", "episodes"), [("Plain-v0", 3), ("OneStep-v0", 1)])
def test_capture_video_records_the_first_episode_of_each_evaluation(name, episodes, tmp_path):
    """A file by the step of each, as fast as the task goes; the run itself stays the same."""
    moviepy = pytest.importorskip("moviepy")
    settings = small("sac", env_id=f"environments:{name}", eval_episodes=episodes)
    filmed = Outcome(sac, settings | {"run_root": str(tmp_path / "on"), "capture_video": True})
    plain = Outcome(sac, settings | {"run_root": str(tmp_path / "off")})
    files = sorted((filmed.folder / "videos").glob("*.mp4"))
    assert [re.match(r"step-(\d+)-", file.name)[1] for file in files] == ["0", "40", "80"]
    with moviepy.VideoFileClip(str(files[0])) as clip:
        assert clip.fps == 100
    assert (filmed.evaluations, same(filmed.agent, plain.agent)) == (plain.evaluations, True)


@pytest.mark.parametrize("script", [sac, mbpo], ids=["sac", "mbpo"])
def test_what_a_run_writes(script, tmp_path):
    """Settings, evaluations, a checkpoint and TensorBoard's curves lie in the run's folder."""
    name = script.__name__
    changes = {"total_timesteps": 1000, "learning_starts": 740, "eval_frequency": 500}
    outcome = Outcome(script, small(name, run_root=str(tmp_path), **changes))
    names = {path.name.split(".")[0] for path in outcome.folder.iterdir()}
    assert names == {"args", "checkpoint", "eval", "events"}
    settings = outcome.saved["settings"]
    assert settings["script"] == f"{name}.py"
    assert settings.keys() == fields(script).keys() | {"script", "version"}
    assert settings == json.loads((outcome.folder / "args.json").read_text())
    header, *lines = (outcome.folder / "eval.csv").read_text().splitlines()
    assert header == "step,mean,std,min,max,episodes,seconds"
    assert lines == outcome.result["evaluations"]
    assert same(outcome.result["agent"], outcome.agent)
    rows = np.array([line.split(",") for line in lines], dtype=float)
    assert rows[:, 0].tolist() == [0, 500, 1000]
    assert (np.diff(rows[:, [3, 1, 4]]) >= 0).all()  # min <= mean <= max
    assert (np.diff(rows[:, 6]) > 0).all()

    scalars = read_scalars(outcome.folder)
    ends = outcome.rows[:, -1].nonzero().flatten() + 1
    update = ("q_loss", "q", "actor_loss", "entropy", "alpha")
    expected = {"train/steps_per_second": [1000]} | {f"sac/{part}": [1000] for part in update}
    expected |= {tag: [0, 500, 1000] for tag in ("eval/return", "eval/critic_bias")}
    expected |= {f"train/episode_{part}": ends.tolist() for part in ("return", "length")}
    if script is not sac:
        expected |= {f"model/{part}": [740, 990] for part in ("loss", "updates", "holdout_mse")}
        new = ("reward_error", "change_error", "reward_std_ratio")
        expected |= {f"model/new_{part}": [990] for part in new}
    assert {tag: [step for step, _ in values] for tag, values in scalars.items()} == expected
    np.testing.assert_allclose([x for _, x in scalars["eval/return"]], rows[:, 1], rtol=1e-4)
    lengths = [length for _, length in scalars["train/episode_length"]]
    assert lengths == np.diff(ends, prepend=0).tolist()


def test_progress_on_stdout(done, tmp_path):
    """The folder and the device, an evaluation a line with speed and time left, what is saved."""
    first, *lines, last = done(mbpo, flags(small("mbpo"))).splitlines()
    assert first == f"{folder_of(tmp_path, 'mbpo')} on {mbpo.Args().device}, from step 0"
    shown = r"step +(\d+)  return +-?[\d.]+ \+- [\d.]+(?:  [\d.]+ steps/s, (\S+) left)?"
    evaluations = [re.fullmatch(shown, line).groups() for line in lines]
    assert evaluations == [("0", None), ("40", None), ("80", "0:00:00")]
    assert last.startswith("80 steps are done")
    assert "checkpoint.pt, eval.csv" in last


@pytest.mark.parametrize(
    ("script", "rate", "said"),
    [
        (sac, "q_lr", "actor_loss is not finite at step 41"),
        (mbpo, "model_lr", "model_loss is not finite at step 40"),
    ],
)
def test_learning_that_diverges_stops_the_run(script, rate, said, main):
    """Losses without bound end it with a line of the quantity and the step."""
    settings = small(script.__name__, eval_frequency=0) | {rate: 1e30}
    code, _, err = main(script, flags(settings))
    assert code == 1
    assert one_error(err) == f"error: {said}: the run stops"
