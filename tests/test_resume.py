"""A run that is killed goes on to the same end; what a run folder holds is never lost."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from helpers_run import (
    ROOT,
    flags,
    folder_of,
    listing,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same,
    small,
    start,
)

TOTAL = 600
SCRIPTS = ["sac", "mbpo_ftfl"]
CHANGES = {"total_timesteps": TOTAL, "learning_starts": 100, "eval_frequency": 50}
CHANGES |= {"checkpoint_frequency": 100, "model_train_frequency": 70, "model_max_updates": 5}
CUT = """
import os, runpy, signal, sys
saves, fsync = 0, os.fsync
def cut(file):
    global saves
    path = os.readlink(f"/proc/self/fd/{file}")
    saves += "checkpoint" in path
    if saves == 2:  # the disk has half of it when the power goes
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync, sys.argv = cut, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def settings(script: str, root, **changes) -> list[str]:
    """Flags of a run of a few seconds with six checkpoints or so."""
    own = {name: value for name, value in CHANGES.items() if script != "sac" or "model" not in name}
    return flags(small(script, **(own | {"run_root": str(root)} | changes)))


@pytest.fixture(scope="module", params=SCRIPTS)
def undisturbed(request, tmp_path_factory):
    """A script's name, and the folder of its run that nothing has stopped."""
    root = tmp_path_factory.mktemp("undisturbed")
    child = start(request.param, *settings(request.param, root))
    assert child.wait(timeout=300) == 0, child.stderr.read()
    return request.param, folder_of(root, request.param)


def assert_equal_runs(one, other) -> None:
    """Evaluations, all of the checkpoint and TensorBoard's curves are those of the other run."""
    assert read_evaluations(one) == read_evaluations(other)
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert ours.keys() == theirs.keys()
    for part in ours.keys() - {"settings", "progress"}:
        assert same(ours[part], theirs[part]), part
    assert ours["progress"][:2] == theirs["progress"][:2]
    assert read_scalars(one) == read_scalars(other)


def kill_after(child, folder, beyond: int, delay: float) -> int:
    """Kills the child once it is past a checkpoint after step `beyond`; returns the saved step."""
    saved = -1
    while child.poll() is None:
        if (folder / "checkpoint.pt").exists():
            saved = read_checkpoint(folder)["progress"][0]
            if saved > beyond and int(read_evaluations(folder)[-1][0]) > saved:
                break
        time.sleep(0.01)
    time.sleep(delay)
    child.kill()
    assert child.wait() in (-signal.SIGKILL, 0), child.stderr.read()  # 0: it was faster
    return saved


def test_a_killed_run_goes_on_to_the_same_end(undisturbed, tmp_path, run):
    """Killed at any moment, three times over, a resumed run ends equal to the bit."""
    script, expected = undisturbed
    words, folder = settings(script, tmp_path), folder_of(tmp_path, script)
    draw, saved = random.Random(1), 0
    for _ in range(3):
        child = start(script, *words, "--resume")
        saved = kill_after(child, folder, saved, draw.uniform(0, 0.1))
    assert run(script, *words, "--resume").returncode == 0
    assert_equal_runs(folder, expected)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(undisturbed, tmp_path, run):
    """With nothing saved yet, --resume begins from the start."""
    script, expected = undisturbed
    words, folder = settings(script, tmp_path), folder_of(tmp_path, script)
    child = start(script, *words)
    while child.poll() is None and not (folder / "eval.csv").exists():
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (folder / "checkpoint.pt").exists()
    assert run(script, *words, "--resume").returncode == 0
    assert_equal_runs(folder, expected)


def test_a_kill_while_saving_leaves_the_checkpoint_before(undisturbed, tmp_path, run):
    """A checkpoint is replaced whole or not at all."""
    script, expected = undisturbed
    words, folder = settings(script, tmp_path), folder_of(tmp_path, script)
    command = [sys.executable, "-c", CUT, str(ROOT / f"{script}.py"), *words]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (folder / "checkpoint.pt.tmp").exists()
    assert 100 <= read_checkpoint(folder)["progress"][0] < 200
    assert run(script, *words, "--resume").returncode == 0
    assert not (folder / "checkpoint.pt.tmp").exists()
    assert_equal_runs(folder, expected)


def test_a_full_disk_keeps_the_checkpoint_before(undisturbed, tmp_path, run):
    """Checkpoints that no longer fit are given up with a word; the run goes on to its end."""
    script, expected = undisturbed
    row = read_checkpoint(expected)["rows"][0].nbytes
    most = (expected / "checkpoint.pt").stat().st_size - 200 * row
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
    child = run(script, *settings(script, tmp_path), preexec_fn=limit)
    folder = folder_of(tmp_path, script)
    assert child.returncode == 0, child.stderr
    lines = child.stderr.splitlines()
    assert lines
    assert all(f"{folder}/checkpoint.pt stays as it was: " in line for line in lines)
    assert 100 <= read_checkpoint(folder)["progress"][0] < TOTAL
    assert read_evaluations(folder) == read_evaluations(expected)
    assert not list(folder.glob("*.tmp"))
    assert run(script, *settings(script, tmp_path), "--resume").returncode == 0
    assert_equal_runs(folder, expected)


@pytest.fixture
def finished(tmp_path, run):
    """Script, flags and folder of a short finished run."""
    words = flags(small("sac", run_root=str(tmp_path)))
    assert run("sac", *words).returncode == 0
    return words, folder_of(tmp_path, "sac")


def assert_refused(child, folder, before, *named: str) -> None:
    """One line that names things, exit code 2, and the folder as it was."""
    line = one_error(child.stderr)
    assert child.returncode == 2
    assert listing(folder) == before
    for name in named:
        assert name in line


def test_a_folder_that_holds_a_run_is_refused(finished, run):
    """Without --resume or --overwrite nothing is touched; --overwrite discards it all."""
    words, folder = finished
    (folder / "note.txt").write_text("of the first run")
    before = listing(folder)
    assert_refused(run("sac", *words), folder, before, str(folder), "--resume", "--overwrite")
    old = read_checkpoint(folder)
    assert run("sac", *words, "--overwrite").returncode == 0
    assert not (folder / "note.txt").exists()
    assert len(list(folder.glob("events*"))) == 1
    assert same(read_checkpoint(folder)["agent"], old["agent"])


def test_resume_refuses_a_checkpoint_that_is_not_of_this_run(finished, run):
    """Other settings, another script and a file cut short are named, and stay as they are."""
    words, folder = finished
    before = listing(folder)
    child = run("sac", *words, "--resume", "--gamma", "0.5")
    assert_refused(child, folder, before, str(folder), "gamma 0.99, not 0.5")
    other = flags(small("mbpo", run_root=str(folder.parent), exp_name="sac"))
    assert_refused(run("mbpo", *other, "--resume"), folder, before, str(folder), "holds a run with")
    file = folder / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = listing(folder)
    child = run("sac", *words, "--resume")
    assert_refused(child, folder, before, str(file), "--overwrite")


def test_resume_goes_on_with_more_steps(finished, run):
    """A finished run is extended by a larger --total-timesteps, and args.json tells."""
    words, folder = finished
    assert run("sac", *words, "--resume", "--total-timesteps", "120").returncode == 0
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80", "120"]
    assert read_checkpoint(folder)["progress"][0] == 120
    assert json.loads((folder / "args.json").read_text())["total_timesteps"] == 120
    assert run("sac", *words, "--resume", "--total-timesteps", "120").returncode == 0
    assert len(read_evaluations(folder)) == 5
