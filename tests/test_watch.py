"""benchmarks/watch.py: it evaluates as training does, films runs side by side, refuses in one line."""

import os
import subprocess
import sys

import numpy as np
import pytest
import report
import torch
import watch
from helpers_run import ROOT, folder_of, listing, one_error, read_checkpoint, small
from helpers_tools import call
from PIL import Image

import mbpo_ftfl


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a small run of a model-based script, evaluated where it is saved."""
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    if subprocess.run(
        [sys.executable, "-c", probe], env=os.environ | {"MUJOCO_GL": "egl"}
    ).returncode:
        pytest.skip("nothing can be rendered here")
    root = tmp_path_factory.mktemp("runs")
    mbpo_ftfl.train(mbpo_ftfl.Args(**small("mbpo_ftfl", run_root=str(root), eval_episodes=3)))
    return folder_of(root, "mbpo_ftfl")


def run_watch(*words) -> subprocess.CompletedProcess:
    """Runs the tool as a child, which finds a renderer."""
    command = [sys.executable, ROOT / "benchmarks/watch.py", *words]
    env = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)


def returns_of(said: str) -> list[float]:
    """The returns that the tool printed."""
    return [float(line.split()[-1]) for line in said.splitlines() if "  return" in line]


def test_it_evaluates_as_training_did(trained):
    """All returns of the last evaluation come again."""
    child = run_watch(trained)
    assert child.returncode == 0, child.stderr
    returns = returns_of(child.stdout)
    _, *numbers = (trained / "eval.csv").read_text().splitlines()[-1].split(",")
    measured = [f(returns) for f in (np.mean, np.std, min, max, len)]
    assert measured == pytest.approx([float(number) for number in numbers[:5]], abs=0.01)


def test_runs_side_by_side_in_one_picture(trained, tmp_path):
    """A run and its recorded policy move alike, a seed gives another episode; other steps don't."""
    results, film = tmp_path / "results", tmp_path / "film.gif"
    report.record((trained,), results)
    recorded = results / trained.name
    starts = []
    for seed in (5, 6):
        child = run_watch(trained, recorded, "--film", film, "--seconds", 3, "--seed", seed)
        returns = returns_of(child.stdout)
        assert (len(returns), returns[:3]) == (6, returns[3:]), child.stderr
        starts.append(Image.open(film).convert("RGB").tobytes())
    assert starts[0] != starts[1]
    assert film.stat().st_size <= watch.MOST
    picture = Image.open(film)
    assert picture.size == (2 * watch.SIZE[0], watch.SIZE[1])
    assert picture.n_frames > 3
    shown = []
    for n in (0, picture.n_frames - 1):
        picture.seek(n)
        halves = np.split(np.asarray(picture.convert("RGB"), int), 2, 1)
        assert np.abs(halves[0] - halves[1]).mean() < 5
        shown.append(halves[0])
    assert np.abs(shown[0] - shown[1]).mean() > 0.5
    saved = torch.load(recorded / "checkpoint.pt")
    torch.save(saved | {"progress": {"step": 90}}, recorded / "checkpoint.pt")
    child = run_watch(trained, recorded, "--film", film)
    assert "are not of one task and step" in one_error(child.stderr)


BAD = [  # what is made of the run's folder, flags, and what the line must say
    (None, "", "holds no checkpoint.pt"),
    (b"no checkpoint", "", "checkpoint.pt is damaged"),
    ({"agent": {}}, "", "checkpoint.pt is damaged, or older"),
    ("other.py", "", "was made by other.py, which is not in"),
    (None, "--episodes 0", "--episodes and --seconds must be above 0"),
    (None, "--film film.avi", "--film must end with"),
]


@pytest.mark.parametrize(("content", "words", "said"), BAD)
def test_bad_input_is_one_line(trained, tmp_path, content, words, said):
    """Exit code 2, and nothing is written."""
    if isinstance(content, str):  # as if another script had written it
        saved = read_checkpoint(trained)
        content = saved | {"settings": saved["settings"] | {"script": content}}
    if isinstance(content, bytes):
        (tmp_path / "checkpoint.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "checkpoint.pt")
    before = listing(tmp_path)
    code, out, err = call(watch.watch, watch.Options, tmp_path, *words.split())
    assert (code, out) == (2, "")
    assert said in one_error(err)
    assert listing(tmp_path) == before
