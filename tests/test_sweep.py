"""benchmarks/sweep.py runs a grid once, whatever stops it, and refuses one that can't be run."""

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffs
import pytest
import sweep
from helpers_run import ROOT, folder_of, listing, one_error, read_checkpoint, small
from helpers_tools import assert_equal_runs, call

SEEDS, TOTAL = [1, 2], 150


def block(script: str, **changes) -> str:
    """A block of a grid, with small settings."""
    settings = small(script, total_timesteps=TOTAL, checkpoint_frequency=40) | changes
    lines = [f"{name.replace('_', '-')} = {json.dumps(v)}" for name, v in settings.items()]
    return "\n".join(["[[grid]]", f'scripts = ["{script}.py"]', *lines, ""])


def grid(folder: Path, *blocks: str, run_root: str = "runs") -> Path:
    """A grid's file in a folder, whose runs are in the folder as well."""
    file = folder / "grid.toml"
    file.write_text("\n".join([f'run-root = "{folder / run_root}"', *blocks]))
    return file


def run_sweep(*words) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    return call(sweep.sweep, sweep.Options, *words)


def wait_for(condition, seconds: float = 300) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def begun(folder: Path) -> int:
    """How often runs in the folder have been started."""
    return sum(log.read_text().count("$ ") for log in folder.glob("runs/*.log"))


def quick_run(folder: Path, code: str = "") -> sweep.Run:
    """A run whose script is a line of Python."""
    folder.mkdir()
    return sweep.Run((sys.executable, "-Sc", code), folder, "{}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The file of a grid of two seeds that has run, and what the tool returned."""
    file = grid(tmp_path_factory.mktemp("undisturbed"), block("sac", seed=SEEDS))
    return file, run_sweep(file, "--jobs", 2)


def test_a_grid_runs_and_is_not_run_twice(undisturbed):
    """Every run reaches its end; the same command then does nothing, one for more steps does."""
    file, (code, out, err) = undisturbed
    assert code == 0, err
    folders = [folder_of(file.parent / "runs", "sac", seed=seed) for seed in SEEDS]
    *told, last = out.splitlines()
    assert {*told} == {f"done: {folder}" for folder in folders}  # each as soon as it is
    assert last == "2 of 2 runs are done"
    for folder in folders:
        assert read_checkpoint(folder)["progress"]["step"] == TOTAL
        assert "step     120 " in folder.with_name(f"{folder.name}.log").read_text()
    before = listing(file.parent)
    assert run_sweep(file)[:2] == (0, "2 of 2 runs are done\n")
    assert listing(file.parent) == before
    longer = grid(file.parent, block("sac", seed=SEEDS, total_timesteps=2 * TOTAL))
    assert [run.done() for run in sweep.read_grid(sweep.Options(longer))] == [False, False]


def test_a_killed_sweep_goes_on_to_the_same_end(undisturbed, tmp_path):
    """Killed with its children, and again with SIGTERM, it ends as if nothing had been."""
    file = grid(tmp_path, block("sac", seed=SEEDS))
    runs = sweep.read_grid(sweep.Options(file))
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", file, "--jobs", "2"]
    for sign, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 1)]:
        pipes = {"start_new_session": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(command, text=True, **pipes)
        starts = begun(tmp_path)
        wait_for(lambda starts=starts: starts < begun(tmp_path))
        if sign == signal.SIGKILL:
            os.killpg(child.pid, sign)
        else:
            child.send_signal(sign)
        said = child.communicate(timeout=60)[1]
        assert child.returncode == code
        assert sign == signal.SIGKILL or said == "error: interrupted; the same command goes on\n"
    code, out, err = run_sweep(file, "--jobs", 2)
    assert (code, out.splitlines()[-1]) == (0, "2 of 2 runs are done"), err
    for run in runs:
        assert_equal_runs(run.folder, undisturbed[0].parent / "runs" / run.folder.name)


def test_a_child_of_a_killed_sweep_is_waited_for(tmp_path):
    """A run that still goes on is not started a second time beside it."""
    run = quick_run(tmp_path / "run", "print('next')")
    words = [sys.executable, "-Sc", "import time; time.sleep(1); print('end', flush=True)"]
    with run.log.open("a") as log:
        sweep.fcntl.flock(log, sweep.fcntl.LOCK_EX)
        child = subprocess.Popen(words, stdout=log)  # holds the lock for as long as it lives
    assert run(set()) == ""
    assert child.wait() == 0
    first, _, last = run.log.read_text().splitlines()
    assert (first, last) == ("end", "next")


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """Each failure comes with exit code and last line; the same grid runs the rest."""
    codes = {"a": "import sys; print(3); sys.exit('no good')", "b": "", "c": "1 / 0"}
    runs = [quick_run(tmp_path / name, code) for name, code in codes.items()]
    failed = sweep.finish(runs, jobs=1)
    assert {run.folder.name: how for run, how in failed.items()} == {
        "a": "exit code 1: no good",
        "c": "exit code 1: ZeroDivisionError: division by zero",
    }
    assert [run.done() for run in runs] == [False, True, False]


def test_a_failed_run_is_reported(tmp_path):
    """What the script refuses when it starts is at the end of the sweep's own output."""
    code, out, err = run_sweep(grid(tmp_path, block("sac", buffer_size=10**12)))
    assert code == 1
    assert out.startswith("failed: ")
    assert out.endswith("\n0 of 1 runs are done\n")
    failure = err.splitlines()[-1]
    folder = folder_of(tmp_path / "runs", "sac")
    assert failure.startswith(f"failed: {folder}: exit code 2: error: ")


def test_dry_run_prints_the_commands(tmp_path):
    """Lists are axes, keys above the blocks are shared, and exp-name takes its flags' values."""
    blocks = [
        "seed = [3, 4]\nlearning-starts = 50",
        '[[grid]]\nscripts = "sac.py"\ngamma = [0.9, 0.95]\nautotune = false',
        'exp-name = "{script}_{gamma}"',
        '[[grid]]\nscripts = ["mbpo.py"]\nseed = 3\nrollout-schedule = "0 9 1 2"',
        "target-entropy = -1",
    ]
    file = grid(tmp_path, *blocks)
    before = listing(tmp_path)
    code, out, _ = run_sweep(file, "--dry-run")
    assert code == 0
    assert listing(tmp_path) == before
    commands = [shlex.split(line) for line in out.splitlines()]
    common = f"--run-root {tmp_path}/runs --resume --learning-starts 50"
    expected = [
        f"sac.py {common} --gamma {x} --no-autotune --exp-name sac_{x} --seed {seed}".split()
        for seed, x in itertools.product((3, 4), (0.9, 0.95))
    ]
    model = "--rollout-schedule 0 9 1 2 --target-entropy -1"
    expected.insert(2, f"mbpo.py {common} {model} --seed 3".split())  # seed by seed
    assert [[Path(script).name, *rest] for _, script, *rest in commands] == expected
    _, alone, _ = run_sweep(file, "--dry-run", "--only", 2)
    assert alone == out.splitlines(keepends=True)[2]


def test_the_grids_are_those_of_the_recorded_runs(tmp_path_factory):
    """Each recorded run is one of a grid's, with the settings of its args.json."""
    (ROOT / "build").exists() or diffs.write()
    runs = {}
    for file in (ROOT / "benchmarks/grids").glob("*.toml"):
        for run in sweep.read_grid(sweep.Options(file)):
            runs.setdefault(run.folder.name, []).append(json.loads(run.settings))
    made_by_hand = {"version", "precision", "resume", "checkpoint_frequency", "device", "compile"}
    for file in (ROOT / "benchmarks/results").glob("*__*__*/args.json"):
        held = json.loads(file.read_text())
        names = held.keys() - made_by_hand
        found = runs.get(file.parent.name, [])
        assert any(all(held[x] == run.get(x, held[x]) for x in names) for run in found), file


ONE = '[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "InvertedPendulum-v5"\n'
BAD = [  # a grid, and what the line must say
    ("a = ", "grid.toml: Invalid value"),
    ("", "grid.toml: there is no block that begins with [[grid]]"),
    ("[[grid]]\nseed = 1", "block 1: scripts is missing"),
    ('[[grid]]\nscripts = ["mpbo.py"]', "there is no script mpbo.py"),
    (ONE + "[[grid]]\nscripts = ['sac.py']\nsed = 2", "--sed"),
    (ONE + "total-timesteps = 5.5", "5.5"),
    (ONE + "gamma = [0.9, 1.5]", "--gamma must be above 0 and at most 1, not 1.5"),
    ('[[grid]]\nscripts = ["sac.py"]\nenv-id = "dmc/walker-rum"', "dmc/walker-run"),
    ('[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "HumanoidStandup-v5"', "--never-terminates"),
    (ONE + ONE, "block 2: {root}/runs/InvertedPendulum-v5__mbpo__1 would hold two runs: tell"),
    (ONE + 'exp-name = "{gama}"', "exp-name {gama}: no flag 'gama' here"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_grid_is_one_line(text, said, tmp_path, monkeypatch):
    """What can't be run ends before anything is started or written, with a line that says why."""
    monkeypatch.setattr(sweep, "finish", lambda *_: pytest.fail("it was started"))
    file = grid(tmp_path, text)
    before = listing(tmp_path)
    code, out, err = run_sweep(file)
    assert (code, out) == (2, "")
    assert said.format(root=tmp_path, gama="{gama}") in one_error(err)
    assert str(file) in err
    assert listing(tmp_path) == before


def test_bad_options_are_one_line(tmp_path, monkeypatch):
    """So do a grid that isn't there, a cluster that isn't there, and options out of range."""
    file = grid(tmp_path, block("sac"))
    assert "No such file" in one_error(run_sweep(tmp_path / "none.toml")[2])
    assert "--jobs must be above 0, not 0" in one_error(run_sweep(file, "--jobs", 0)[2])
    assert "--only must be from 0 to 0, not 1" in one_error(run_sweep(file, "--only", 1)[2])
    assert "--only must be" in one_error(run_sweep(file, "--dry-run", "--only", 1)[2])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in one_error(run_sweep(file, "--slurm=")[2])
