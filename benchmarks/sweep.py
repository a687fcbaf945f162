"""Runs a grid of the repository's scripts: several at a time, here or on a SLURM cluster.

    python benchmarks/sweep.py benchmarks/grids/first_curves.toml --jobs 2
    python benchmarks/sweep.py GRID.toml --dry-run     checks the grid and prints its commands
    python benchmarks/sweep.py GRID.toml --cluster slurm --partition gpu --hours 24 --gpus 1

In a block of the grid every key but `scripts` is a flag, with its value as on the command line; a
list is an axis. Keys above the blocks hold for all of them. All runs of one seed come before those
of the next. Each run needs a folder of its own: exp-name tells apart those of one task and seed.

    run-root = "runs/first"
    seed = [1, 2]
    [[grid]]
    scripts = ["mbpo.py", "mbpo_ftfl.py"]
    env-id = ["dmc/walker-run", "dmc/hopper-stand"]
    updates-per-step = [10, 20]
    rollout-schedule = "20000 100000 1 5"
    exp-name = "{script}_utd{updates-per-step}"

All of it is checked before anything starts. A run's output is in its folder, in log.txt. After an
interruption, a kill or a failure the same command goes on: it skips what is done and resumes the
rest. The exit code is 1 if a run failed, and 2 for bad input.
"""

import difflib
import fcntl
import functools
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from inspect import formatannotation
from pathlib import Path
from typing import IO, Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SHIELD = ["sh", "-c", 'trap "" TERM USR2; exec "$@"', "sh"]  # runs "$@", deaf to these signals


class InputError(ValueError):
    """What was asked for can't be done; one line says why and what to do."""


@dataclass
class Options:
    grid: tyro.conf.Positional[Path]  # the TOML file
    jobs: int | None = None  # runs at a time; by default one per core, on a cluster all
    cluster: Literal["local", "slurm"] = "local"  # slurm: pip install -e '.[benchmarks]'
    partition: str | None = None  # SLURM's partition
    hours: float = 24.0  # time limit of a job; a run that is not done by then is queued again
    cpus: int = 1  # cores, and threads, of a job on the cluster
    gpus: int = 0  # GPUs of a job on the cluster
    slurm: dict[str, str] = field(default_factory=dict)
    """other options of sbatch, as in --slurm account my_lab mem 8G"""
    dry_run: bool = False  # print the commands, and start nothing


@dataclass(eq=False)
class Run:
    """A run of a script by a child process, which locks the run's log for as long as it lives.

    So a child that outlives its sweep, or belongs to another one, is waited for.
    """

    command: list[str]
    folder: Path
    settings: dict  # as in args.json, but for run_root and source
    threads: int
    log: IO | None = None
    process: subprocess.Popen | None = None

    def done(self) -> bool:
        """Whether these very settings have run to exit code 0, which is what done.json records.

        Neither eval.csv nor the checkpoint can tell: the last evaluation may come before the last
        step, and a run may have no checkpoints.
        """
        file = self.folder / "done.json"
        return file.exists() and file.read_text() == json.dumps(self.settings)

    def step(self) -> int:
        """The step of the last evaluation, or of the end."""
        file, total = self.folder / "eval.csv", self.settings["total_timesteps"]
        if self.done() or not file.exists():
            return total if self.done() else 0
        return min(total, int(file.read_text().splitlines()[-1].split(",")[0]))

    def outcome(self) -> str | None:
        """Starts the child when the log is free. Then None: goes on, "": done, else what failed."""
        if self.process is None:
            self.log = self.log or (self.folder / "log.txt").open("a+", errors="replace")
            try:
                fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if self.done():
                return ""
            print(f"$ {shlex.join(self.command)}", file=self.log, flush=True)
            env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
            files = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
            self.process = subprocess.Popen(self.command, env=env, **files)
        if code := self.process.poll():
            self.log.seek(0)
            return f"exit code {code}: {self.log.read().strip().splitlines()[-1]}"
        if code == 0:
            (self.folder / "done.json").write_text(json.dumps(self.settings))
        return None if code is None else ""

    def stop(self) -> None:
        """Ends the child, whose files are whole at any moment."""
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.log:
            self.log.close()

    def __call__(self) -> str:
        """What a job of the cluster does; returns the outcome."""
        try:
            while (outcome := self.outcome()) is None:
                time.sleep(1)
            return outcome
        finally:
            self.stop()

    def checkpoint(self):
        """What submitit queues when the job is preempted or out of time: the same, to go on."""
        again = replace(self, log=None, process=None)
        return import_module("submitit").helpers.DelayedSubmission(again)


class ClusterJob:
    """A run as a job of the cluster, for `watch`."""

    def __init__(self, job):
        self.job = job

    def outcome(self) -> str | None:
        """As of a Run; if the job itself failed, submitit's words."""
        if not self.job.done():
            return None
        error = self.job.exception()
        said = error and f"{str(error).splitlines()[0]}, see {self.job.paths.stderr}"
        return said or self.job.result()

    def stop(self) -> None:
        """Takes the job out of the queue, if it is still in there."""
        if not self.job.done():
            self.job.cancel(check=False)


def submit(runs: list[Run], executor) -> dict[Run, ClusterJob]:
    """Hands the runs to a submitit executor, which gets the signals, as one array of jobs."""
    with redirect_stderr(io.StringIO()), executor.batch():  # or sbatch's errors come twice
        jobs = [executor.submit(replace(run, command=SHIELD + run.command)) for run in runs]
    return dict(zip(runs, map(ClusterJob, jobs), strict=True))


def slurm_executor(options: Options, folder: Path):
    """The submitit executor that the options ask for, with its own files in a folder; or None."""
    if options.cluster == "local":
        return None
    try:
        submitit = import_module("submitit")
    except ImportError:
        raise InputError("--cluster slurm needs submitit: pip install -e '.[benchmarks]'") from None
    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1000)
    executor.update_parameters(
        name=options.grid.stem,
        timeout_min=int(60 * options.hours),
        cpus_per_task=options.cpus,
        gpus_per_node=options.gpus,
        slurm_partition=options.partition,
        slurm_array_parallelism=options.jobs,
        slurm_additional_parameters={"requeue": True} | options.slurm,
    )
    return executor


def known(kind: str, name: str, names: list[str]) -> str:
    """The name, if it is among the names; else InputError with the nearest of them."""
    if name not in names:
        near = difflib.get_close_matches(name, names, 1, 0)[0]
        raise InputError(f"there is no {kind} {name}; did you mean {near}?")
    return name


def words(flag: str, value) -> list[str]:
    """A flag and its value, as the command line spells them."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *str(value).split()]


@functools.cache
def parse(script, flag: str, *words: str) -> dict:
    """A flag as {field of the script's Args: value}; InputError if there is no such thing."""
    types = {f.name.replace("_", "-"): f.type for f in fields(script.Args)}
    own = {"run-root", "resume", "overwrite"}  # these are the sweep's
    known(f"flag of {script.__name__}.py", flag, sorted(types.keys() - own))
    try:
        with redirect_stderr(io.StringIO()):
            args = tyro.cli(script.Args, args=words)
    except SystemExit:
        kind = formatannotation(types[flag])
        raise InputError(f"{flag} takes {kind}, not {' '.join(words[1:] or words)}") from None
    name = flag.replace("-", "_")
    return {name: getattr(args, name)}


@functools.cache
def check_task(script, env_id: str, render: bool) -> None:
    """Raises the script's InputError for a task that it can't make."""
    script.make_env(env_id, render).close()


def make_run(name: str, flags: dict, root: Path, options: Options) -> Run:
    """The run of a script with these flags; InputError if the script has something against it."""
    name = known("script", name, sorted(path.name for path in ROOT.glob("*.py")))
    script, args = import_module(Path(name).stem), {}
    if "exp-name" in flags:
        try:
            names = flags | {"script": script.__name__}
            flags["exp-name"] = str(flags["exp-name"]).format_map(names)
        except (AttributeError, LookupError, ValueError) as error:
            raise InputError(f"exp-name {flags['exp-name']}: no flag {error} here") from None
    for flag, value in flags.items():
        args |= parse(script, flag, *words(flag, value))
    args, local = script.Args(**args), options.cluster == "local"
    here = args if local else replace(args, device="auto", capture_video=False)  # jobs have more
    with tempfile.TemporaryDirectory() as scratch:
        args = replace(args, run_root=scratch, resume=True)
        try:
            script.check_args(here)
            check_task(script, here.env_id, here.capture_video)
            if hasattr(script, "termination_function"):
                script.termination_function(here)
            copy = script.run_folder(args)
            folder = root / copy.name
            if (folder / "args.json").exists():  # without the checkpoint, which would take a while
                copy.mkdir(parents=True)
                shutil.copy(folder / "args.json", copy)
            settings, _ = script.read_run(args, None)
        except script.InputError as error:
            raise InputError(str(error).replace(scratch, str(root))) from None
    command = [sys.executable, str(ROOT / name), "--run-root", str(root), "--resume"]
    command += itertools.chain.from_iterable(itertools.starmap(words, flags.items()))
    del settings["run_root"], settings["source"]  # what is done may be moved, the script edited
    return Run(command, folder, settings, threads=1 if local else options.cpus)


def read_grid(options: Options) -> list[Run]:
    """The runs of a grid, seed by seed; InputError, with the block's number, if it has a fault."""
    place, runs = f"{options.grid}", {}
    try:
        shared = tomllib.loads(options.grid.read_text())
        root, blocks = Path(shared.pop("run-root", "runs")), shared.pop("grid", None)
        if not blocks or not isinstance(blocks, list):
            raise InputError("there is no block that begins with [[grid]]")
        for number, block in enumerate(blocks, 1):
            place = f"{options.grid}, block {number}"
            block = {"scripts": []} | shared | block
            axes = {key: v if isinstance(v, list) else [v] for key, v in block.items()}
            if empty := [key for key, values in axes.items() if not values]:
                raise InputError(f"{empty[0]} is missing")
            for values in itertools.product(*axes.values()):
                flags = dict(zip(axes, values, strict=True))
                run = make_run(str(flags.pop("scripts")), flags, root, options)
                if run.folder in runs:
                    remedy = 'tell them apart, as by exp-name = "{script}_{gamma}"'
                    raise InputError(f"{run.folder} would hold two runs: {remedy}")
                runs[run.folder] = run
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    return sorted(runs.values(), key=lambda run: run.settings["seed"])


def watch(runs: list[Run], start, limit: int) -> dict[Run, str]:
    """Has `start` take up the runs, `limit` at a time; returns what failed, and how."""
    todo, active, failed = [run for run in runs if not run.done()], {}, {}
    steps = {run: run.step() for run in runs}
    total = sum(run.settings["total_timesteps"] for run in runs)
    every = 0.5 if sys.stderr.isatty() else 60  # seconds
    bar = tqdm(total=total, initial=sum(steps.values()), unit="step", miniters=0, mininterval=every)
    try:
        while todo or active:
            while todo and len(active) < limit:
                run = todo.pop(0)
                active[run] = start(run)
            for run, job in list(active.items()):
                if (outcome := job.outcome()) is not None:
                    active.pop(run).stop()
                    failed |= {run: outcome} if outcome else {}
                steps[run] = run.step()
            done = len(runs) - len(todo) - len(active) - len(failed)
            held = sum(job is run and not run.process for run, job in active.items())
            about = f"{done} of {len(runs)} runs done, {len(failed)} failed"
            about += f", {held} held by another sweep" if held else ""
            bar.set_postfix_str(about, refresh=False)
            bar.update(sum(steps.values()) - bar.n)
            time.sleep(0.2)
    finally:
        for job in active.values():
            job.stop()
        bar.close()
    return failed


def main() -> None:
    """Does what the command line says; bad input is one line on stderr and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.path.insert(0, str(ROOT))
    options = tyro.cli(Options, description=__doc__)
    try:
        for name in ("jobs", "hours", "cpus"):
            if (value := getattr(options, name)) is not None and value <= 0:
                raise InputError(f"--{name} must be above 0, not {value}")
        runs = read_grid(options)
        if options.dry_run:
            print(*(shlex.join(run.command) for run in runs), sep="\n")
            return
        todo = [run for run in runs if not run.done()]
        executor = slurm_executor(options, Path(runs[0].folder.parent, "submitit"))
        for run in todo:
            run.folder.mkdir(parents=True, exist_ok=True)
        if executor and todo:
            failed = watch(runs, submit(todo, executor).get, len(runs))
        else:
            failed = watch(runs, lambda run: run, options.jobs or os.cpu_count())
    except KeyboardInterrupt:
        sys.exit("error: interrupted; the same command goes on")
    except (InputError, OSError, RuntimeError) as error:  # submitit has RuntimeErrors
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for run, outcome in failed.items():
        print(f"failed: {run.folder}: {outcome}", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
