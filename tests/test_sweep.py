"""benchmarks/sweep.py runs a grid once, whatever stops it, and refuses one that can't be run."""

import fcntl
import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers_run import (
    ROOT,
    folder_of,
    listing,
    one_error,
    read_checkpoint,
    read_evaluations,
    same,
    small,
)

sys.path.insert(0, str(ROOT / "benchmarks"))

import report
import sweep

SCRIPTS, SEEDS, TOTAL = ["sac", "mbpo_ftfl"], [1, 2], 150
CHANGES = {"total_timesteps": TOTAL, "checkpoint_frequency": 40, "model_train_frequency": 100}
SLEEP = "import time; time.sleep({})"


def block(script: str, **changes) -> str:
    """A block of a grid, with small settings."""
    own = {key: v for key, v in CHANGES.items() if script != "sac" or "model" not in key}
    settings = small(script, **own) | changes
    lines = [f"{name.replace('_', '-')} = {json.dumps(v)}" for name, v in settings.items()]
    return "\n".join(["[[grid]]", f'scripts = ["{script}.py"]', *lines, ""])


def grid(folder: Path, *blocks: str, run_root: str = "runs") -> Path:
    """A grid's file in a folder, whose runs are in the folder as well."""
    file = folder / "grid.toml"
    file.write_text("\n".join([f'run-root = "{folder / run_root}"', *blocks]))
    return file


def call(*words) -> tuple[int, str, str]:
    """Calls the sweep's main in this process; returns exit code, stdout and stderr."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sweep.py", *map(str, words)])
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        try:
            code = sweep.main()
        except SystemExit as ending:
            code = ending.code
    signal.signal(signal.SIGTERM, handler)
    return code or 0, out.getvalue(), err.getvalue()


def runs_of(file: Path) -> list:
    """The runs of a grid's file."""
    return sweep.read_grid(sweep.Options(file))


def wait_for(condition, seconds: float = 300) -> None:
    """Returns as soon as the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def quick_run(folder: Path, code: str = "", total: int = 10) -> sweep.Run:
    """A run whose script is a line of Python."""
    folder.mkdir(exist_ok=True)
    return sweep.Run([sys.executable, "-Sc", code], folder, {"total_timesteps": total}, 1)


def assert_equal_runs(one: Path, other: Path) -> None:
    """Evaluations and checkpoint are those of the other run, but for seconds and folders."""
    assert read_evaluations(one) == read_evaluations(other)
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert ours.keys() == theirs.keys()
    for part in ours.keys() - {"settings", "progress"}:
        assert same(ours[part], theirs[part]), part
    assert ours["progress"][:2] == theirs["progress"][:2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The file of a grid of two scripts and two seeds that has run, and what main returned."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = grid(folder, *(block(script, seed=SEEDS) for script in SCRIPTS))
    return file, call(file, "--jobs", 2)


def test_a_grid_runs_and_is_not_run_twice(undisturbed):
    """Every run reaches its end, with one line of progress; the same command then does nothing."""
    file, (code, out, err) = undisturbed
    assert code == 0, err
    assert out == "4 of 4 runs are done\n"
    assert err.splitlines()[-1].split("\r")[-1].startswith("100%|")
    assert f"{4 * TOTAL}/{4 * TOTAL}" in err
    assert "4 of 4 runs done, 0 failed" in err
    root = file.parent / "runs"
    for folder in (folder_of(root, script, seed=seed) for script in SCRIPTS for seed in SEEDS):
        assert read_checkpoint(folder)["progress"][0] == TOTAL
        assert "step     120 " in (folder / "log.txt").read_text()
        assert '"source"' not in (folder / "done.json").read_text()  # a script may be reworded
    before = listing(file.parent)
    assert call(file)[:2] == (0, "4 of 4 runs are done\n")
    assert listing(file.parent) == before


def test_a_killed_sweep_goes_on_to_the_same_end(undisturbed, tmp_path):
    """Killed with its children in the middle of the second pair, it ends as if nothing were."""
    file = grid(tmp_path, *(block(script, seed=SEEDS) for script in SCRIPTS))
    command = [sys.executable, ROOT / "benchmarks" / "sweep.py", file, "--jobs", "2"]
    child = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    runs = runs_of(file)
    wait_for(lambda: all(run.done() for run in runs[:2]))
    wait_for(lambda: any((run.folder / "checkpoint.pt").exists() for run in runs[2:]))
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not all(run.done() for run in runs)
    code, out, err = call(file, "--jobs", 2)
    assert (code, out) == (0, "4 of 4 runs are done\n"), err
    starts = [(run.folder / "log.txt").read_text().count("$ ") for run in runs]
    assert starts[:2] == [1, 1]
    assert 2 in starts
    for run in runs:
        assert_equal_runs(run.folder, undisturbed[0].parent / "runs" / run.folder.name)


def test_sigterm_stops_the_children(tmp_path):
    """The sweep ends with exit code 1 and one line, no child is left, and nothing is done."""
    file = grid(tmp_path, block("sac", total_timesteps=10**7))
    (run,) = runs_of(file)

    def interrupt():
        wait_for((run.folder / "eval.csv").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, out, _ = call(file)
    thread.join()
    assert (code, out) == ("error: interrupted; the same command goes on", "")
    assert not run.done()
    with open(run.folder / "log.txt") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_child_of_a_killed_sweep_is_waited_for(tmp_path):
    """A run that still goes on is not started twice, and one that got done meanwhile not at all."""
    first, second, third = (quick_run(tmp_path / "run", SLEEP.format(1)) for _ in range(3))
    assert first.outcome() is None
    first.log.close()  # as the system does when the sweep is killed
    assert second.outcome() is None
    assert second.process is None
    assert third.outcome() is None
    assert first.process.poll() is None
    first.process.wait()
    assert second.outcome() is None
    assert second.process is not None
    wait_for(lambda: second.outcome() == "")
    assert third.outcome() is None
    second.stop()
    assert third.outcome() == ""
    assert third.process is None
    third.stop()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    """Each failure comes with exit code and last line; only `limit` children live at a time."""
    codes = {"a": "import sys; print(3); sys.exit('no good')", "b": SLEEP.format(1)}
    codes |= {"c": "1 / 0", "d": ""}
    runs = [quick_run(tmp_path / name, code) for name, code in codes.items()]
    alive = []

    def start(run):
        alive.append(sum(r.process is not None and r.process.poll() is None for r in runs))
        return run

    failed = sweep.watch(runs, start, 2)
    assert {run.folder.name: how for run, how in failed.items()} == {
        "a": "exit code 1: no good",
        "c": "exit code 1: ZeroDivisionError: division by zero",
    }
    assert [run.done() for run in runs] == [False, True, False, True]
    assert max(alive) == 1
    runs[2].command[-1] = ""
    assert sweep.watch(runs[1:], lambda run: quick_run(run.folder), 1) == {}


def test_a_failed_run_is_reported(tmp_path):
    """What the script refuses when it starts is at the end of the sweep's own output."""
    code, out, err = call(grid(tmp_path, block("sac", buffer_size=10**12)))
    folder = folder_of(tmp_path / "runs", "sac")
    assert code == 1
    assert out == "0 of 1 runs are done\n"
    failure = err.splitlines()[-1]
    assert failure.startswith(f"failed: {folder}: exit code 2: error: ")
    assert "GiB" in failure


def test_done_means_these_settings(undisturbed):
    """A grid that asks for more steps than were run is not done, whatever its evaluations say."""
    file, _ = undisturbed
    longer = grid(file.parent, block("sac", seed=SEEDS, total_timesteps=2 * TOTAL))
    runs = runs_of(longer)
    file = grid(file.parent, *(block(script, seed=SEEDS) for script in SCRIPTS))
    assert [run.done() for run in runs] == [False, False]
    assert [run.step() for run in runs] == [120, 120]
    assert [run.done() for run in runs_of(file)] == [True] * 4


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
    code, out, _ = call(file, "--dry-run")
    assert code == 0
    assert listing(tmp_path) == before
    commands = [shlex.split(line) for line in out.splitlines()]
    common = f"--run-root {tmp_path}/runs --resume --seed {{}} --learning-starts 50"
    expected = [
        f"sac.py {common.format(seed)} --gamma {gamma} --no-autotune --exp-name sac_{gamma}".split()
        for seed, gamma in itertools.product((3, 4), (0.9, 0.95))
    ]
    model = "--rollout-schedule 0 9 1 2 --target-entropy -1"
    expected.insert(2, f"mbpo.py {common.format(3)} {model}".split())  # seed by seed
    assert [[Path(script).name, *rest] for _, script, *rest in commands] == expected


def test_the_grids_are_those_of_the_recorded_runs():
    """Each recorded run of today's code is one of a grid's, with the settings of its args.json."""
    grids = (ROOT / "benchmarks" / "grids").glob("*.toml")
    runs = [run for grid in grids for run in runs_of(grid)]
    assert len(runs) == 15
    free = {"resume", "overwrite", "checkpoint_frequency", "device", "compile"}
    for file in (ROOT / "benchmarks" / "results").glob("*__*__*/args.json"):
        held = json.loads(file.read_text())
        asked = [run.settings for run in runs if run.folder.name == file.parent.name]
        same = [all(held.get(x) == ask[x] for x in ask.keys() - free) for ask in asked]
        assert report.mark(held) or any(same), file


ONE = '[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "dmc/walker-run"\n'
BAD = [  # a grid, and what the line must say
    ("a = ", "grid.toml: Invalid value"),
    ("", "grid.toml: there is no block that begins with [[grid]]"),
    ('[grid]\nscripts = ["sac.py"]', "there is no block that begins with [[grid]]"),
    ("[[grid]]\nseed = 1", "block 1: scripts is missing"),
    (ONE + "seed = []", "block 1: seed is missing"),
    ('[[grid]]\nscripts = ["mpbo.py"]', "there is no script mpbo.py; did you mean mbpo.py?"),
    (
        ONE + "[[grid]]\nscripts = ['sac.py']\nsed = 2",
        "block 2: there is no flag of sac.py sed; did",
    ),
    (ONE + "total-timestep = 5", "did you mean total-timesteps?"),
    (ONE + "total_timesteps = 5", "did you mean total-timesteps?"),
    (ONE + "run-root = 'x'", "there is no flag of mbpo.py run-root"),
    (ONE + "total-timesteps = 5.5", "total-timesteps takes int, not 5.5"),
    (ONE + "total-timesteps = true", "total-timesteps takes int, not --total-timesteps"),
    (ONE + "autotune = 3", "autotune takes bool, not 3"),
    (ONE + "rollout-schedule = [1, 2, 3, 4]", "takes tuple[int, int, int, int], not 1"),
    (ONE + "gamma = [0.9, 1.5]", "--gamma must be above 0 and at most 1, not 1.5"),
    (ONE + "real-ratio = 2", "--real-ratio must be at least 0 and below 1, not 2.0"),
    ('[[grid]]\nscripts = ["sac.py"]\nreal-ratio = 1', "there is no flag of sac.py real-ratio"),
    ('[[grid]]\nscripts = ["sac.py"]\nenv-id = "dmc/walker-rum"', "dmc/walker-run"),
    ('[[grid]]\nscripts = ["mbpo.py"]\nenv-id = "HumanoidStandup-v5"', "--never-terminates"),
    (ONE + "gamma = [0.9, 0.95]", "walker-run__mbpo__1 would hold two runs: tell them apart"),
    (ONE + ONE, "block 2: {root}/runs/dmc-walker-run__mbpo__1 would hold two runs"),
    (ONE + 'exp-name = "{gama}"', "exp-name {gama}: no flag 'gama' here"),
    (ONE + 'exp-name = "a/b"', "--exp-name must be a name without /, not 'a/b'"),
    (ONE + 'exp-name = "held"', "runs/dmc-walker-run__held__1 holds a run with"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_grid_is_one_line(text, said, tmp_path, monkeypatch):
    """What can't be run ends before anything is written, with a line that says why."""
    monkeypatch.setattr(sweep, "watch", lambda *_: pytest.fail("it was started"))
    held = folder_of(tmp_path / "runs", "held", "dmc/walker-run")
    held.mkdir(parents=True)
    (held / "args.json").write_text('{"gamma": 0.5}')
    file = grid(tmp_path, text)
    before = listing(tmp_path)
    code, out, err = call(file)
    assert (code, out) == (2, "")
    assert said.format(root=tmp_path, gama="{gama}") in one_error(err)
    assert str(file) in err
    assert listing(tmp_path) == before


def test_bad_options_are_one_line(tmp_path, monkeypatch):
    """So do a grid that isn't there, a run root that can't be, and options out of range."""
    monkeypatch.setattr(sweep, "watch", lambda *_: pytest.fail("it was started"))
    file = grid(tmp_path, block("sac"))
    assert "No such file" in one_error(call(tmp_path / "none.toml")[2])
    assert "--jobs must be above 0, not 0" in one_error(call(file, "--jobs", 0)[2])
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = call(file, "--cluster", "slurm")
    assert code == 2
    assert "pip install -e '.[benchmarks]'" in one_error(err)
    assert list(tmp_path.iterdir()) == [file]
    code, _, err = call(grid(tmp_path, block("sac"), run_root="grid.toml/below"))
    assert code == 2
    assert "grid.toml" in one_error(err)
    assert list(tmp_path.iterdir()) == [file]


def test_a_shielded_child_outlives_the_signals_of_preemption(tmp_path):
    """SLURM signals all processes of a job; only submitit's answers."""
    run = quick_run(tmp_path / "run", f"print('up', flush=True); {SLEEP.format(60)}")
    run.command = sweep.SHIELD + run.command
    assert run.outcome() is None
    wait_for(lambda: (run.folder / "log.txt").read_text().endswith("up\n"))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        run.process.send_signal(number)
    time.sleep(0.3)
    assert run.outcome() is None
    run.stop()
    assert run.process.returncode == -signal.SIGKILL


def test_a_preempted_job_goes_on(undisturbed, tmp_path, monkeypatch):
    """Queued again by submitit, a job takes up its run at the checkpoint; an error is told."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    (run,) = runs_of(grid(tmp_path, block("sac")))
    run.folder.mkdir(parents=True)
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(timeout_min=10)
    bad = quick_run(tmp_path / "bad", "import sys; sys.exit(7)")
    jobs = sweep.submit([run, bad], executor)

    def preempt():
        """Signals what belongs to the job as SLURM does: all of it."""
        wait_for((run.folder / "checkpoint.pt").exists)
        task = children(jobs[run].job._process.pid)[0]
        for pid in [*children(task), task]:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR2)

    thread = threading.Thread(target=preempt)
    thread.start()
    failed = sweep.watch([run, bad], jobs.get, 2)
    thread.join()
    assert {r.folder.name: how.split(":")[0] for r, how in failed.items()} == {"bad": "exit code 7"}
    assert (run.folder / "log.txt").read_text().count(f"$ {shlex.join(sweep.SHIELD)}") == 2
    expected = folder_of(undisturbed[0].parent / "runs", "sac")
    assert_equal_runs(run.folder, expected)


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_slurm_is_asked_for(tmp_path, monkeypatch):
    """One array of jobs with the options; what sbatch says against it is one line."""
    pytest.importorskip("submitit")
    for name, line in {"srun": "", "sbatch": 'cp "$1" $SENT; echo Submitted batch job 7'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SENT", str(tmp_path / "sent"))
    options = sweep.Options(tmp_path / "grid.toml", 2, "slurm", "gpu", 2.5, 2, 1, {"mem": "8G"})
    runs = [quick_run(tmp_path / name) for name in "abc"]
    jobs = sweep.submit(runs, sweep.slurm_executor(options, tmp_path / "submitit"))
    assert [jobs[run].job.job_id for run in runs] == ["7_0", "7_1", "7_2"]
    asked = {
        line.removeprefix("#SBATCH --") for line in (tmp_path / "sent").read_text().split("\n")
    }
    assert {"partition=gpu", "time=150", "cpus-per-task=2", "gpus-per-node=1", "mem=8G"} <= asked
    assert {"array=0-2%2", "job-name=grid", "requeue"} <= asked
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2; exit 1")
    file = grid(tmp_path, block("sac", device="cuda"))
    code, _, err = call(file, "--cluster", "slurm", "--partition", "gpuu")
    assert code == 2
    assert "invalid partition" in one_error(err)
