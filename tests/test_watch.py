"""benchmarks/watch.py: it evaluates as training does, films runs side by side."""

import os
import subprocess
import sys

import numpy as np
import pytest
import report
import torch
import watch
from helpers_run import ROOT, folder_of, one_error, small
from helpers_tools import refusal
from PIL import Image

import mbpo_ftfl


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of a model-based script, evaluated where it is saved."""
    probe = [sys.executable, "-c", "import mujoco; mujoco.GLContext(64, 64).make_current()"]
    if subprocess.run(probe, env=os.environ | {"MUJOCO_GL": "egl"}).returncode:
        pytest.skip("nothing can be rendered here")
    root = tmp_path_factory.mktemp("runs")
    mbpo_ftfl.train(mbpo_ftfl.Args(**small("mbpo_ftfl", run_root=str(root), eval_episodes=3)))
    return folder_of(root, "mbpo_ftfl")


def run_watch(*words) -> tuple[list[float], subprocess.CompletedProcess]:
    """Runs the tool as a child, which finds a renderer; returns the returns that it printed."""
    command = [sys.executable, ROOT / "benchmarks/watch.py", *words]
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    child = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    return [float(x.split()[-1]) for x in child.stdout.splitlines() if "  return" in x], child


def test_it_evaluates_as_training_did(trained):
    """All returns of the last evaluation come again."""
    returns, child = run_watch(trained)
    assert child.returncode == 0, child.stderr
    _, *numbers = (trained / "eval.csv").read_text().splitlines()[-1].split(",")
    measured = [f(returns) for f in (np.mean, np.std, min, max, len)]
    assert measured == pytest.approx([float(number) for number in numbers[:5]], abs=0.01)


def test_runs_side_by_side_in_one_picture(trained, tmp_path):
    """A run and its recorded policy move alike, a seed gives another episode; other steps don't."""
    results, film = tmp_path / "results", tmp_path / "film.gif"
    report.record((trained,), results)
    recorded = results / trained.name
    starts = set()
    for seed in (5, 6):
        words = "--film", film, "--seconds", 3, "--seed", seed
        returns, child = run_watch(trained, recorded, *words)
        assert (len(returns), returns[:3]) == (6, returns[3:]), child.stderr
        starts.add(Image.open(film).convert("RGB").tobytes())
    assert len(starts) == 2
    picture = Image.open(film)
    assert picture.size == (2 * watch.SIZE[0], watch.SIZE[1])
    shown = []
    for n in (0, picture.n_frames - 1):
        picture.seek(n)
        halves = np.split(np.asarray(picture.convert("RGB"), int), 2, 1)
        assert np.abs(halves[0] - halves[1]).mean() < 5
        shown.append(halves[0])
    assert np.abs(shown[0] - shown[1]).mean() > 0.5
    saved = torch.load(recorded / "checkpoint.pt")
    torch.save(saved | {"progress": {"step": 90}}, recorded / "checkpoint.pt")
    _, child = run_watch(trained, recorded, "--film", film)
    assert "are not of one task and step" in one_error(child.stderr)


BAD = [  # what is in checkpoint.pt, flags, and what the line must say
    (None, "", "holds no checkpoint.pt"),
    (b"no checkpoint", "", "checkpoint.pt can't be read"),
    ({"agent": {}}, "", "is not one of these scripts"),
    (None, "--episodes 0", "--episodes and --seconds must be above 0"),
    (None, "--film film.avi", "--film must end with"),
]


@pytest.mark.parametrize(("content", "words", "said"), BAD)
def test_bad_input_is_one_line(tmp_path, content, words, said):
    """Exit code 2, and nothing is written."""
    if isinstance(content, dict):
        torch.save(content, tmp_path / "checkpoint.pt")
    elif content:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    assert said in refusal(tmp_path, watch.watch, watch.Options, tmp_path, *words.split())
