"""benchmarks/watch.py: it evaluates as training does, films what happens, refuses in one line."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers_run import ROOT, folder_of, listing, one_error, read_checkpoint, small
from PIL import Image

import mbpo_ftfl
import sac

sys.path.insert(0, str(ROOT / "benchmarks"))

import watch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of a model-based script, evaluated where it is saved."""
    root = tmp_path_factory.mktemp("runs")
    mbpo_ftfl.train(mbpo_ftfl.Args(**small("mbpo_ftfl", run_root=str(root), eval_episodes=3)))
    return folder_of(root, "mbpo_ftfl")


@pytest.fixture(scope="module")
def renderer():
    """Skips where nothing can be rendered, as MuJoCo itself finds."""
    command = [sys.executable, "-c", "import mujoco; mujoco.GLContext(64, 64).make_current()"]
    child = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    if child.returncode:
        pytest.skip(child.stderr.splitlines()[-1])


@pytest.fixture
def main(monkeypatch, capsys):
    """Calls watch's main in-process; returns exit code, stdout, stderr."""

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, words)])
        capsys.readouterr()
        try:
            watch.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def watch_alone(*words, **variables) -> subprocess.CompletedProcess:
    """Runs watch.py in a process of its own, for a second renderer in one process shows black."""
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"} | variables
    command = [sys.executable, ROOT / "benchmarks" / "watch.py", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.usefixtures("renderer")
def test_it_evaluates_as_training_did(trained, tmp_path):
    """All returns of the last evaluation come again, and the GIF shows the episodes move."""
    child = watch_alone(trained, "--video", tmp_path / "watch.gif")
    assert (child.returncode, child.stderr) == (0, "")
    returns = [float(line.split()[-1]) for line in child.stdout.splitlines()[:-1]]
    step, *numbers = (trained / "eval.csv").read_text().splitlines()[-1].split(",")
    assert int(step) == read_checkpoint(trained)["progress"][0]
    measured = [f(returns) for f in (np.mean, np.std, min, max, len)]
    assert measured == pytest.approx([float(number) for number in numbers[:5]], abs=0.01)
    assert f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}" in child.stdout
    with Image.open(tmp_path / "watch.gif") as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(image.convert("RGB").tobytes())
    assert len(frames) == sum(returns) + 2 * 3  # all states, and a step that falls gives nothing
    assert len(set(frames)) > 3


@pytest.mark.usefixtures("renderer")
def test_the_video_lies_in_the_run(trained):
    """Without --video it is an mp4 there."""
    pytest.importorskip("imageio_ffmpeg")
    child = watch_alone(trained, "--episodes", 1)
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith(f"; {trained / 'watch.mp4'}\n")
    assert (trained / "watch.mp4").read_bytes()[4:8] == b"ftyp"
    (trained / "watch.mp4").unlink()


@pytest.mark.parametrize("seed", [None, 7])
def test_a_seed_gives_other_episodes(trained, tmp_path, monkeypatch, seed):
    """Episodes start where the given seed says, or as those of training's evaluation."""
    seeds = []

    class Camera(gym.Wrapper):
        def __init__(self, env, path):
            super().__init__(env)

        def reset(self, **kwargs):
            seeds.append(kwargs["seed"])
            return self.env.reset(**kwargs)

    monkeypatch.setattr(watch, "Camera", Camera)
    make_env = mbpo_ftfl.make_env
    monkeypatch.setattr(mbpo_ftfl, "make_env", lambda env_id, render: make_env(env_id))
    assert len(watch.watch(trained, 2, seed, tmp_path / "a.gif")) == 2
    assert seeds == [mbpo_ftfl.derive_seed(seed or 1, 1, 80, episode) for episode in range(2)]


@pytest.mark.parametrize(("every", "interval"), [(1, 0.04), (5, 0.008), (2, 0.025), (1, 0.1)])
def test_the_video_keeps_the_time_of_the_task(tmp_path, monkeypatch, every, interval):
    """Frames are left out, but a second of the task takes a second."""
    made = {}
    monkeypatch.setattr(watch.imageio, "get_writer", lambda path, **timing: made | timing)
    env = sac.make_env("InvertedPendulum-v5")
    monkeypatch.setattr(type(env.unwrapped), "dt", interval)
    camera = watch.Camera(env, tmp_path / "a.mp4")
    assert camera.every == every
    assert camera.video["fps"] == pytest.approx(1 / (every * interval))
    camera = watch.Camera(env, tmp_path / "a.gif")
    assert camera.video["duration"] == pytest.approx(1000 * every * interval)


BAD = [  # what is made of the run's folder, flags, and what the line must say
    (None, "", "is no folder"),
    ({}, "", "holds no checkpoint.pt"),
    ({"checkpoint.pt": b""}, "", "checkpoint.pt is damaged or cut short"),
    ({"checkpoint.pt": b"no checkpoint"}, "", "checkpoint.pt is damaged or cut short"),
    ({"checkpoint.pt": 0.5}, "", "checkpoint.pt is damaged or cut short"),
    ({"checkpoint.pt": {"agent": {}}}, "", "checkpoint.pt is damaged or cut short"),
    ({"checkpoint.pt": "other.py"}, "", "was written by other.py, which is not in"),
    ({"checkpoint.pt": "sac.py"}, "", "was trained by another version of sac.py"),
    ({"checkpoint.pt": 1}, "--video {tmp}/a.avi", "--video must end in .mp4 or .gif, not"),
    ({"checkpoint.pt": 1}, "--video {tmp}/none/a.gif", "none is no folder to write to"),
    ({"checkpoint.pt": 1}, "--episodes 0", "--episodes must be at least 1, not 0"),
    ({"checkpoint.pt": 1}, "--episodes x", "invalid int value: 'x'; --help"),
    ({"checkpoint.pt": 1}, "--seed -1", "--seed must be 0 or more, not -1"),
]


@pytest.mark.parametrize(("files", "words", "said"), BAD)
def test_bad_input_is_one_line(trained, tmp_path, main, files, words, said):
    """Exit code 2, and nothing is written. A number is the share that is left of a checkpoint."""
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        whole = (trained / name).read_bytes()
        if isinstance(content, int | float):
            content = whole[: int(content * len(whole))]
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
            continue
        if isinstance(content, str):  # as if another script had written it
            saved = read_checkpoint(trained)
            saved["agent"]["actor"]["params"].popitem()
            content = saved | {"settings": saved["settings"] | {"script": content}}
        torch.save(content, folder / name)
    before = listing(tmp_path)
    code, out, err = main(
        folder, "--video", tmp_path / "a.gif", *words.format(tmp=tmp_path).split()
    )
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert listing(tmp_path) == before


def test_an_mp4_needs_moviepy(trained, main, monkeypatch):
    """Without it the line names package and way round, and no file is begun."""
    monkeypatch.setattr(watch.util, "find_spec", lambda name: None)
    code, _, err = main(trained)
    assert code == 2
    assert "pip install moviepy, or give --video with a name in .gif" in one_error(err)
    assert not (trained / "watch.mp4").exists()


def test_no_renderer_is_one_line(trained, tmp_path):
    """What can't render is told before a video is begun."""
    child = watch_alone(trained, "--video", tmp_path / "a.gif", MUJOCO_GL="nothing")
    assert (child.returncode, child.stdout) == (2, "")
    assert "MUJOCO_GL" in one_error(child.stderr)
    assert not listing(tmp_path)
