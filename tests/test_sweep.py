"""benchmarks/sweep.py runs a grid once, whatever stops it, and refuses one that can't be run."""

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
from helpers_tools import assert_equal_runs, call, refusal

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
        time.sleep(0.05)


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
    told = {f"done: {folder}" for folder in folders}  # each as soon as it is
    assert {*out.splitlines()} == told | {"2 of 2 runs are done"}
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

    def begun() -> int:
        return sum(log.read_text().count("$ ") for log in tmp_path.glob("runs/*.log"))

    for sign in (signal.SIGKILL, signal.SIGTERM):
        starts = begun()
        child = subprocess.Popen(command, text=True, start_new_session=True, stderr=subprocess.PIPE)
        wait_for(lambda starts=starts: starts < begun())
        (os.killpg if sign == signal.SIGKILL else os.kill)(child.pid, sign)
        said = child.communicate(timeout=60)[1]
        assert sign == signal.SIGKILL or said == "error: interrupted; the same command goes on\n"
        assert child.returncode == (1 if sign == signal.SIGTERM else -sign)
    assert run_sweep(file, "--jobs", 2)[0] == 0
    for run in runs:
        assert_equal_runs(run.folder, undisturbed[0].parent / "runs" / run.folder.name)


def test_a_child_of_a_killed_sweep_is_waited_for(tmp_path):
    """A run that still goes on is not started a second time beside it."""
    folder, log = tmp_path / "run", tmp_path / "run.log"
    folder.mkdir()
    run = sweep.Run((sys.executable, "-Sc", "print('next')"), folder, "{}")
    words = [sys.executable, "-Sc", "import time; time.sleep(1); print('end', flush=True)"]
    with log.open("a") as file:
        sweep.fcntl.flock(file, sweep.fcntl.LOCK_EX)
        child = subprocess.Popen(words, stdout=file)  # holds the lock for as long as it lives
    assert run.finish() == ""
    assert child.wait() == 0
    first, _, last = log.read_text().splitlines()
    assert (first, last) == ("end", "next")


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """It is named with exit code and last line, when it fails and at the end; the rest is done."""
    file = grid(tmp_path, block("sac", buffer_size=10**12, seed=1), block("sac", seed=2))
    code, out, err = run_sweep(file, "--jobs", 1)
    failed, good = (folder_of(tmp_path / "runs", "sac", seed=seed) for seed in (1, 2))
    lines = [f"failed: {failed}", f"done: {good}", "1 of 2 runs are done"]
    assert (code, out.splitlines()) == (1, lines)
    last = err.splitlines()[-1]
    assert last.startswith(f"failed: {failed}: exit code 2: error: the replay buffers need")
    assert [run.done() for run in sweep.read_grid(sweep.Options(file))] == [False, True]


def test_dry_run_prints_the_commands(tmp_path):
    """Lists are axes, keys above the blocks are shared, and exp-name takes its flags' values."""
    text = (
        'seed = [3, 4]\nlearning-starts = 50\n[[grid]]\nscripts = "sac.py"\ngamma = [0.9, 0.95]\n'
    )
    text += 'autotune = false\nexp-name = "{script}_{gamma}"\n[[grid]]\nscripts = ["mbpo.py"]\n'
    file = grid(tmp_path, text + 'seed = 3\nrollout-schedule = "0 9 1 2"\ntarget-entropy = -1')
    code, out, _ = run_sweep(file, "--dry-run")
    assert (code, [*tmp_path.iterdir()]) == (0, [file])
    commands = [shlex.split(line) for line in out.splitlines()]
    common = f"--run-root {tmp_path}/runs --resume --learning-starts 50"
    flags = f"{common} --gamma {{0}} --no-autotune --exp-name sac_{{0}} --seed {{1}}".format
    model = f"{common} --rollout-schedule 0 9 1 2 --target-entropy -1 --seed 3"
    expected = [f"sac.py {flags(x, 3)}" for x in (0.9, 0.95)] + [f"mbpo.py {model}"]
    expected += [f"sac.py {flags(x, 4)}" for x in (0.9, 0.95)]  # seed by seed
    assert [shlex.join([Path(x).name, *rest]) for _, x, *rest in commands] == expected
    _, alone, _ = run_sweep(file, "--dry-run", "--only", 2)
    assert alone == out.splitlines(keepends=True)[2]


def test_the_grids_are_those_of_the_recorded_runs(tmp_path_factory):
    """Each recorded run is one of a grid's, with the settings of its args.json."""
    (ROOT / "build").exists() or diffs.write()
    runs = {}
    for file in (ROOT / "benchmarks/grids").glob("*.toml"):
        for run in sweep.read_grid(sweep.Options(file)):
            runs.setdefault(run.folder.name, []).append(json.loads(run.settings))
    free = {"version", "precision", "resume", "checkpoint_frequency", "device", "compile"}
    for file in (ROOT / "benchmarks/results").glob("*__*__*/args.json"):
        held, found = json.loads(file.read_text()), runs.get(file.parent.name, [])
        assert any(all(held[x] == run.get(x, held[x]) for x in held.keys() - free) for run in found)


ONE = '[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "InvertedPendulum-v5"\n'
BAD = [  # a grid, and what the line must say
    ("", "grid.toml: there is no block that begins with [[grid]]"),
    ("[[grid]]\nseed = 1", "block 1: scripts is missing"),
    ('[[grid]]\nscripts = ["mpbo.py"]', "mpbo.py"),
    (ONE + "[[grid]]\nscripts = ['sac.py']\nsed = 2", "--sed"),
    (ONE + "gamma = [0.9, 1.5]", "--gamma must be above 0 and at most 1, not 1.5"),
    ('[[grid]]\nscripts = ["sac.py"]\nenv-id = "dmc/walker-rum"', "dmc/walker-run"),
    ('[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "HumanoidStandup-v5"', "--never-terminates"),
    (ONE + ONE, "block 2: {root}/runs/InvertedPendulum-v5__mbpo__1 would hold two runs: tell"),
    (ONE + 'exp-name = "{gama}"', "exp-name {gama}: no flag 'gama' here"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_grid_is_one_line(text, said, tmp_path, monkeypatch):
    """What can't be run ends before anything is started or written, with a line that says why."""
    monkeypatch.setattr(sweep.Run, "finish", lambda _: pytest.fail("it was started"))
    file = grid(tmp_path, text)
    error = refusal(tmp_path, sweep.sweep, sweep.Options, file)
    assert said.format(root=tmp_path, gama="{gama}") in error
    assert str(file) in error


def test_bad_options_are_one_line(tmp_path, monkeypatch):
    """So do a grid that isn't there, a cluster that isn't there, and options out of range."""
    file = grid(tmp_path, block("sac"))
    for words in ("--jobs 0", "--only 1", "--dry-run --only 1"):
        error = refusal(tmp_path, sweep.sweep, sweep.Options, file, *words.split())
        assert f"{words.split()[-2]} must be" in error
    assert "No such file" in refusal(tmp_path, sweep.sweep, sweep.Options, tmp_path / "none.toml")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch" in one_error(run_sweep(file, "--slurm=")[2])
