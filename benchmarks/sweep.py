"""Runs a grid of the repository's scripts: several at a time, here or on a SLURM cluster.

    python benchmarks/sweep.py benchmarks/grids/walker_run.toml --jobs 2
    python benchmarks/sweep.py GRID.toml --dry-run     checks the grid and prints its commands
    python benchmarks/sweep.py GRID.toml --slurm="--partition gpu --gpus 1 --time 24:00:00"

How a grid is written: benchmarks/README.md. All of it is checked before anything starts. A run's
output is in <folder>.log. After an interruption, a kill or a failure the same command goes on. With
--slurm the runs are one array of jobs, and one out of time is queued again.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import tyro
from common import ROOT, InputError, load_script, parse, run_tool
from tqdm import tqdm

check_task = cache(lambda env_id: load_script("sac.py").make_env(env_id).close())  # of a second
CHILDREN: set[subprocess.Popen] = set()
JOB = """\
#!/bin/bash
#SBATCH --requeue --open-mode=append --signal=B:USR1@60
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

    def done(self) -> bool:
        """Whether these very settings have run to exit code 0, which is what done.json records."""
        file = self.folder / "done.json"
        return file.exists() and file.read_text() == self.settings

    def finish(self) -> str:
        """Runs to the end, whatever has begun already; returns what failed."""
        file = self.folder.with_name(f"{self.folder.name}.log")  # the script makes the folder
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # waits for a child that has outlived its sweep
            if self.done():
                return ""
            print(f"$ {shlex.join(self.command)}", file=log, flush=True)
            threads = os.environ.get("SLURM_CPUS_PER_TASK", "1")
            env = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            child = subprocess.Popen(self.command, env=env, **files)
            CHILDREN.add(child)
            if (code := child.wait()) == 0:
                (self.folder / "done.json").write_text(self.settings)
        tqdm.write(f"{'failed' if code else 'done'}: {self.folder}")
        last = file.read_text(errors="replace").strip().splitlines()[-1]
        return f"failed: {self.folder}: exit code {code}: {last}\n" if code else ""


def queue(numbers: list[int], root: Path, options: Options) -> None:
    """Queues these of the grid's runs on SLURM, as one array of jobs."""
    root.mkdir(parents=True, exist_ok=True)
    array = ",".join(map(str, numbers)) + (f"%{options.jobs}" if options.jobs else "")
    command = ["sbatch", f"--job-name={options.grid.stem}", f"--output={root}/slurm-%A_%a.txt"]
    command += [f"--array={array}", *shlex.split(options.slurm)]
    job = JOB.format(command=shlex.join([sys.executable, __file__, str(options.grid)]))
    asked = subprocess.run(command, input=job, capture_output=True, text=True)
    if asked.returncode:
        raise InputError(f"--slurm {options.slurm}: {asked.stderr.strip()}")
    print(f"{asked.stdout.strip()}, {len(numbers)} runs; the same command later skips what is done")


def make_run(name: str, flags: dict, root: Path, options: Options) -> Run:
    """The run of a script with these flags; InputError if the script has something against it."""
    if not (ROOT / name).is_file():
        raise InputError(f"no script {name}" + ": run benchmarks/diffs.py" * ("build/" in name))
    script = load_script(name)
    if "exp-name" in flags:
        try:
            flags["exp-name"] = str(flags["exp-name"]).format(script=script.__name__, **flags)
        except (AttributeError, LookupError, ValueError) as error:
            raise InputError(f"exp-name {flags['exp-name']}: no flag {error} here") from None
    flags["seed"] = flags.pop("seed", script.Args.seed)  # stands last
    given = ["--run-root", str(root), "--resume"]
    for flag, value in flags.items():
        words = [] if isinstance(value, bool) else str(value).split()
        given += [f"--{'no-' * (value is False)}{flag}", *words]
    args = parse(script.Args, "", given)
    there = {} if options.slurm is None else {"device": "cpu", "capture_video": False}
    script.check_args(replace(args, **there))  # a cluster may have what this machine lacks
    check_task(args.env_id)
    if hasattr(script, "termination_function"):
        script.termination_function(args)
    settings = {"script": Path(name).name, "version": script.VERSION} | asdict(args)
    del settings["run_root"]  # what is done may be moved
    command = sys.executable, str(ROOT / name), *given
    return Run(command, script.run_folder(args), json.dumps(settings))


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
            axes = {"scripts": []} | shared | block
            axes = {key: v if isinstance(v, list) else [v] for key, v in axes.items()}
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
        raise InputError(f"{place}: {error}") from None
    return sorted(runs.values(), key=lambda run: json.loads(run.settings)["seed"])


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
    pool = ThreadPoolExecutor(options.jobs or os.cpu_count())
    try:
        failures = pool.map(Run.finish, [runs[number] for number in todo])
        failures = [*filter(None, tqdm(failures, total=len(todo), unit="run", disable=None))]
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr, flush=True)
        pool.shutdown(wait=False, cancel_futures=True)
        for child in [*CHILDREN]:
            child.kill()  # its files are whole at any moment
        os._exit(1)  # without waiting for threads that wait
    print(*failures, sep="", end="", file=sys.stderr)
    print(f"{len(numbers) - len(failures)} of {len(numbers)} runs are done")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run_tool(sweep, Options, __doc__)
