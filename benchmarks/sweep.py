"""Runs a grid of the repository's scripts: several at a time, here or on a SLURM cluster.

    python benchmarks/sweep.py benchmarks/grids/walker_run.toml --jobs 2
    python benchmarks/sweep.py GRID.toml --dry-run     checks the grid and prints its commands
    python benchmarks/sweep.py GRID.toml --slurm="--partition gpu --gpus 1 --time 24:00:00"

How a grid is written: benchmarks/README.md. Seeds come one after the other.
The scripts' own checks see all of it before anything starts. A run's output is in <folder>.log.
After an interruption, a kill or a failure the same command goes on: it skips what is done and
resumes the rest. The exit code is 1 if a run failed, and 2 for bad input. With --slurm the runs are
queued as one array of jobs; a job out of time is queued again, and goes on where it was.
"""

import fcntl
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import tyro
from common import ROOT, InputError, load_script, parse, run_tool
from tqdm import tqdm

JOB = """\
#!/bin/bash
trap 'scontrol requeue $SLURM_JOB_ID' USR1  # comes a minute before the time is up
{command} --only $SLURM_ARRAY_TASK_ID &
wait $!
"""


@dataclass
class Options:
    grid: tyro.conf.Positional[Path]  # the TOML file
    jobs: int | None = None  # runs at a time; by default one per core, on a cluster all
    dry_run: bool = False  # print the commands, and start nothing
    slurm: str | None = None  # queue the runs on SLURM, with these options of sbatch
    only: int | None = None  # this run alone, by its place among the commands of --dry-run, from 0


@dataclass(frozen=True)
class Run:
    """A run of a script by a child process, which locks the run's log for as long as it lives."""

    command: tuple[str, ...]
    folder: Path
    settings: str  # as in args.json, but for run_root
    seed: int = 0

    @property
    def log(self) -> Path:  # beside the folder, which the script makes
        return self.folder.with_name(f"{self.folder.name}.log")

    def done(self) -> bool:
        """Whether these very settings have run to exit code 0, which is what done.json records."""
        file = self.folder / "done.json"
        return file.exists() and file.read_text() == self.settings

    def __call__(self, children: set[subprocess.Popen]) -> str:
        """Runs to the end, whatever has begun already; returns what failed."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a+", errors="replace") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # waits for a child that has outlived its sweep
            if self.done():
                return ""
            print(f"$ {shlex.join(self.command)}", file=log, flush=True)
            threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
            env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            child = subprocess.Popen(self.command, env=env, **files)
            children.add(child)
            if code := child.wait():
                log.seek(0)
                return f"exit code {code}: {log.read().strip().splitlines()[-1]}"
        (self.folder / "done.json").write_text(self.settings)
        return ""


def finish(runs: list[Run], jobs: int | None) -> dict[Run, str]:
    """Has the runs done here, so many at a time; returns what failed, and how."""
    children: set[subprocess.Popen] = set()
    pool = ThreadPoolExecutor(jobs or os.cpu_count())
    try:
        futures, failed = {pool.submit(run, children): run for run in runs}, {}
        for future in tqdm(as_completed(futures), total=len(runs), unit="run", disable=None):
            if outcome := future.result():
                failed[futures[future]] = outcome
            tqdm.write(f"{'failed' if outcome else 'done'}: {futures[future].folder}")
        return failed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()  # its files are whole at any moment


def queue(numbers: list[int], root: Path, options: Options) -> None:
    """Queues these of the grid's runs on SLURM, as one array of jobs."""
    root.mkdir(parents=True, exist_ok=True)
    at_once = f"%{options.jobs}" if options.jobs else ""
    command = ["sbatch", f"--job-name={options.grid.stem}", f"--output={root}/slurm-%A_%a.txt"]
    command += [f"--array={','.join(map(str, numbers))}{at_once}", "--requeue"]
    command += ["--open-mode=append", "--signal=B:USR1@60", *shlex.split(options.slurm)]
    job = JOB.format(command=shlex.join([sys.executable, __file__, str(options.grid)]))
    try:
        asked = subprocess.run(command, input=job, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError("--slurm: there is no sbatch here") from None
    if asked.returncode:
        raise InputError(f"--slurm {options.slurm}: {asked.stderr.strip()}")
    print(f"{asked.stdout.strip()}, {len(numbers)} runs; the same command later skips what is done")


def words(flag: str, value) -> list[str]:
    """A flag and its value, as the command line spells them."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *str(value).split()]


@cache
def check_task(script, env_id: str, never_terminates: bool) -> None:
    """Raises InputError for a task that the script can't make, or knows no end of."""
    script.make_env(env_id).close()
    if hasattr(script, "termination_function"):
        script.termination_function(script.Args(env_id=env_id, never_terminates=never_terminates))


def make_run(name: str, flags: dict, root: Path, options: Options) -> Run:
    """The run of a script with these flags; InputError if the script has something against it."""
    if not (ROOT / name).is_file():
        made = ": run benchmarks/diffs.py" if name.startswith("build/") else ""
        raise InputError(f"there is no script {name}{made}")
    script = load_script(name)
    if "exp-name" in flags:
        try:
            flags["exp-name"] = str(flags["exp-name"]).format(script=script.__name__, **flags)
        except (AttributeError, LookupError, ValueError) as error:
            raise InputError(f"exp-name {flags['exp-name']}: no flag {error} here") from None
    seed = words("seed", flags.pop("seed", script.Args.seed))
    given = ["--run-root", str(root), "--resume", *(x for f in flags.items() for x in words(*f))]
    args = parse(script.Args, "", [*given, *seed])
    here = options.slurm is None  # or jobs may have what this machine lacks
    script.check_args(args if here else replace(args, device="cpu", capture_video=False))
    check_task(script, args.env_id, getattr(args, "never_terminates", False))
    settings = {"script": Path(name).name, "version": script.VERSION} | asdict(args)
    del settings["run_root"]  # what is done may be moved
    command = sys.executable, str(ROOT / name), *given, "--seed", str(args.seed)
    return Run(command, script.run_folder(args), json.dumps(settings), args.seed)


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
                    remedy = 'tell them apart by exp-name = "{script}_{FLAG}", FLAG what differs'
                    raise InputError(f"{run.folder} would hold two runs: {remedy}")
                runs[run.folder] = run
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    return sorted(runs.values(), key=lambda run: run.seed)


def sweep(options: Options) -> None:
    """Runs what of the grid is not done."""
    if options.jobs is not None and options.jobs <= 0:
        raise InputError(f"--jobs must be above 0, not {options.jobs}")
    runs = read_grid(options)
    numbers = range(len(runs)) if options.only is None else [options.only]
    if not {*numbers} <= {*range(len(runs))}:
        raise InputError(f"--only must be from 0 to {len(runs) - 1}, not {options.only}")
    if options.dry_run:
        return print(*(shlex.join(runs[number].command) for number in numbers), sep="\n")
    todo = [number for number in numbers if not runs[number].done()]
    if options.slurm is not None and todo:
        return queue(todo, runs[0].folder.parent, options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        failed = finish([runs[number] for number in todo], options.jobs)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for threads that wait
    for run, outcome in failed.items():
        print(f"failed: {run.folder}: {outcome}", file=sys.stderr)
    print(f"{len(numbers) - len(failed)} of {len(numbers)} runs are done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_tool(sweep, Options, __doc__)
