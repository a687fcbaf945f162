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

The scripts' own checks see all of it before anything starts. A run's output is in its folder, in
log.txt. After an interruption, a kill or a failure the same command goes on: it skips what is done
and resumes the rest. The exit code is 1 if a run failed, and 2 for bad input.
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
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import tyro
from common import ROOT, InputError, load_script, load_task, parse, run_tool
from tqdm import tqdm


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


@dataclass(frozen=True)
class Run:
    """A run of a script by a child process, which locks the run's log for as long as it lives."""

    command: tuple[str, ...]
    folder: Path
    settings: str  # as in args.json, but for run_root and source
    threads: int
    seed: int = 0
    shielded: bool = False  # from the signals of preemption, which only submitit answers

    def done(self) -> bool:
        """Whether these very settings have run to exit code 0, which is what done.json records.

        Neither eval.csv nor the checkpoint can tell: the last evaluation may come before the last
        step, and a run may have no checkpoints.
        """
        file = self.folder / "done.json"
        return file.exists() and file.read_text() == self.settings

    def __call__(self, children: set[subprocess.Popen] | None = None) -> str:
        """Runs to the end, whatever has begun already; returns what failed. A job of a cluster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a+", errors="replace") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # waits for a child that has outlived its sweep
            if self.done():
                return ""
            print(f"$ {shlex.join(self.command)}", file=log, flush=True)
            env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            child = subprocess.Popen(
                self.command, env=env, preexec_fn=shield if self.shielded else None, **files
            )
            if children is not None:
                children.add(child)
            if code := child.wait():
                log.seek(0)
                return f"exit code {code}: {log.read().strip().splitlines()[-1]}"
        (self.folder / "done.json").write_text(self.settings)
        return ""

    def checkpoint(self):
        """What submitit queues when the job is preempted or out of time: the same, to go on."""
        import submitit  # here, because the local sweep does without

        return submitit.helpers.DelayedSubmission(self)


def shield() -> None:
    """SLURM signals all processes of a job; the child shall not heed it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def slurm_jobs(runs: list[Run], options: Options) -> dict:
    """The runs as one array of jobs, each with its future."""
    try:
        import submitit
    except ImportError:
        raise InputError("--cluster slurm needs submitit: pip install -e '.[benchmarks]'") from None
    folder = Path(runs[0].folder.parent, "submitit")
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
    try:
        with executor.batch():
            jobs = [executor.submit(replace(run, shielded=True)) for run in runs]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise InputError(f"sbatch refuses: {error}") from None
    return dict(zip(runs, jobs, strict=True))


def outcome_of(job) -> str:
    """What failed of a run on the cluster, once its job is over."""
    error = job.exception()
    return f"{str(error).splitlines()[0]}, see {job.paths.stderr}" if error else job.result()


def finish(runs: list[Run], options: Options) -> dict[Run, str]:
    """Has all runs done, as many at a time as the options say; returns what failed, and how."""
    children: set[subprocess.Popen] = set()
    jobs = slurm_jobs(runs, options) if options.cluster == "slurm" and runs else None
    pool = ThreadPoolExecutor(len(runs) + 1 if jobs else options.jobs or os.cpu_count())
    try:
        if jobs:
            futures = {pool.submit(outcome_of, jobs[run]): run for run in runs}
        else:
            futures = {pool.submit(run, children): run for run in runs}
        failed = {}
        for future in tqdm(as_completed(futures), total=len(runs), unit="run", disable=None):
            if outcome := future.result():
                failed[futures[future]] = outcome
        return failed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()  # its files are whole at any moment
        for job in (jobs or {}).values():
            if not job.done():
                job.cancel(check=False)


def words(flag: str, value) -> list[str]:
    """A flag and its value, as the command line spells them."""
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *str(value).split()]


@cache
def check_task(script, env_id: str, never_terminates: bool) -> None:
    """Raises InputError for a task that the script can't make, or knows no end of."""
    load_task(env_id)
    script.make_env(env_id).close()
    if hasattr(script, "termination_function"):
        args = script.Args(env_id=env_id, never_terminates=never_terminates)
        script.termination_function(args)


def make_run(name: str, flags: dict, root: Path, options: Options) -> Run:
    """The run of a script with these flags; InputError if the script has something against it."""
    if not (ROOT / name).is_file():
        raise InputError(f"there is no script {name}")
    script, local = load_script(name), options.cluster == "local"
    if "exp-name" in flags:
        try:
            named = flags | {"script": script.__name__}
            flags["exp-name"] = str(flags["exp-name"]).format_map(named)
        except (AttributeError, LookupError, ValueError) as error:
            raise InputError(f"exp-name {flags['exp-name']}: no flag {error} here") from None
    given = list(itertools.chain.from_iterable(itertools.starmap(words, flags.items())))
    given = ["--run-root", str(root), "--resume", *given]
    args = parse(script.Args, "", given)
    # Jobs of a cluster may have what this machine lacks.
    script.check_args(args if local else replace(args, device="cpu", capture_video=False))
    check_task(script, args.env_id, getattr(args, "never_terminates", False))
    settings = {"script": Path(name).name} | asdict(args)
    del settings["run_root"]  # what is done may be moved
    command = sys.executable, str(ROOT / name), *given
    threads = 1 if local else options.cpus
    return Run(command, script.run_folder(args), json.dumps(settings), threads, args.seed)


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
    except (OSError, ValueError) as error:
        raise InputError(f"{place}: {getattr(error, 'strerror', None) or error}") from None
    return sorted(runs.values(), key=lambda run: run.seed)


def sweep(options: Options) -> None:
    """Runs what of the grid is not done."""
    for name in ("jobs", "hours", "cpus"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise InputError(f"--{name} must be above 0, not {value}")
    runs = read_grid(options)
    if options.dry_run:
        print(*(shlex.join(run.command) for run in runs), sep="\n")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    runs[0].folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        failed = finish([run for run in runs if not run.done()], options)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for threads that wait
    for run, outcome in failed.items():
        print(f"failed: {run.folder}: {outcome}", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_tool(sweep, Options, __doc__)
