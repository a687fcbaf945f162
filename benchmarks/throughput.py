"""What this machine does per second with our updates, with those of peers, and at its very best.

    python benchmarks/throughput.py                           everything there is
    python benchmarks/throughput.py --only sac --peers sbx    SAC updates, beside sbx alone
    python benchmarks/throughput.py --only model rollout --rounds 3 --seconds 1
    python benchmarks/throughput.py --pythons sbx ~/sbx/bin/python mbrl-lib ~/mbrl/bin/python

Measured are SAC updates, updates of the ensemble, rollouts of the model and steps of whole runs, at
the sizes of walker-run and humanoid-walk; beside them, in turn, round after round, so that whatever
else the machine does hits all alike: the SAC of stable-baselines3 and of sbx (JAX), mbrl-lib's SAC,
ensemble and rollouts, and the matrix products of an update alone, which no
implementation in this precision can outrun. All draw their batches from a buffer, which is counted.

Every contender is a process of its own with the same threads (benchmarks/peers/), idle but in its
turn. A peer runs in this Python, or in the one of an environment of its own; one that is not
installed there, or fails, is a line in the table. To install them:

    pip install stable-baselines3==2.9.2 sbx-rl==0.28.0 jax
    pip install hydra-core==1.3.2 gymnasium matplotlib termcolor tqdm && pip install --no-deps mbrl

Written after every round: OUT/cpu.csv or cuda.csv, a line per measurement; .md and .png from it.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, ROOT, InputError, load_script, markdown, run_tool
from matplotlib import pyplot as plt
from peers.ours import products
from tqdm import tqdm
from updates import FIT_EVERY, FIT_UPDATES

KINDS = {
    "sac": "SAC updates",
    "model": "model updates",
    "rollout": "rollout transitions",
    "env": "environment steps alone",
    "steps": "steps of a run",
}
MEASURED, PEERS = ("sac", "model", "rollout", "steps"), ("stable-baselines3", "sbx", "mbrl-lib")
ENVS = ["dmc/walker-run", "dmc/humanoid-walk"]
SCRIPTS = ["sac", "mbpo", "mbpo_ftfl", "mbpo_residual_ablation"]
PRODUCTS, PARTS = "its matrix products alone", "mbrl-lib's parts"
LABELS = ["kind", "task", "who"]
COLUMNS = ["round", *LABELS, "version", "count", "seconds", "rate", "gflop", "error"]
COLUMNS += ["sac_updates", "model_updates"]
NOTES = f"""\
SAC: batches of 256, two hidden layers of 256. Models: 7 members, four hidden layers of 200, batches
of 256. Rollouts: 400 branches of one step. Steps of a run: walker-run with the script's defaults,
but for evaluations and checkpoints, which are off, and fits, which are ten times as frequent and as
short, {FIT_UPDATES} updates every {FIT_EVERY} steps; mbrl-lib's parts are one environment step, as
many SAC and model updates as ours made per step, and 400 rollouts. Median and range are those of
the rounds; ratios and shares are taken round by round. Start: seconds of the first two calls, most
of them compilation; of a run, until the first fit is done.
"""


@dataclass
class Options:
    rounds: int = 7  # rounds, in each of which all have a turn
    seconds: float = 3.0  # seconds of a turn at least
    threads: int = 2  # CPU cores and threads of each contender
    only: tuple[Literal[MEASURED], ...] = MEASURED  # what is measured
    peers: tuple[Literal[PEERS], ...] = PEERS  # beside whom
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """cpu or cuda"""
    out: Path = RESULTS / "throughput"  # folder of the results
    pythons: dict[str, str] = field(default_factory=dict)  # of peers with environments of their own


class Peer(NamedTuple):
    """Another implementation: its worker, what is measured of it, what its worker has to know."""

    worker: str
    kinds: tuple[str, ...]
    setting: dict = {}  # noqa: RUF012


ALL_PEERS = {
    "stable-baselines3": Peer("stable", ("sac",), {"package": "stable_baselines3"}),
    "sbx": Peer("stable", ("sac",), {"package": "sbx"}),
    "mbrl-lib": Peer("mbrl_lib", ("sac", "model", "rollout")),
}


class Worker:
    """A contender's process, started when it is first asked."""

    def __init__(self, command: list, log: Path):
        self.command, self.log, self.failure, self.process = command, log, "", None

    def ask(self, **request) -> dict:
        """The answer; {"error": ...} where something went wrong, and ever after if it is over."""
        if self.failure:
            return {"error": self.failure}
        if not self.process:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with open(self.log, "w") as said:
                place = {"stderr": said, "cwd": ROOT / "benchmarks"}
                self.process = subprocess.Popen(self.command, **pipes, **place)
        with suppress(BrokenPipeError):  # it has ended, as the end of its output says
            print(json.dumps(request), file=self.process.stdin, flush=True)
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.failure = (self.log.read_text().splitlines() or ["it ended without a word"])[-1]
        return {"error": self.failure}

    def close(self) -> None:
        """Ends the process."""
        if self.process:
            self.process.kill()
            self.process.wait()


def plan(options: Options, folder: Path, workers: dict) -> list[tuple[Worker, str, dict]]:
    """(worker, task, labels) in the order of their turns; the workers are put into `workers`."""
    contenders = {"ours": Peer("ours", ("sac", "model", "rollout"))}
    contenders |= {name: ALL_PEERS[name] for name in options.peers}
    sizes, turns = {}, []
    for env_id in ENVS:
        env = load_script("mbpo_ftfl.py").make_env(env_id)
        sizes[env_id] = {"obs": env.observation_space.shape[0], "action": env.action_space.shape[0]}

    def turn(kind: str, env_id: str, name: str, peer: Peer, wanted: str, **labels) -> None:
        if (name, env_id) not in workers:
            python, log = options.pythons.get(name, sys.executable), folder / f"{len(workers)}.log"
            setting = {"env_id": env_id, "device": options.device} | sizes[env_id] | peer.setting
            command = [python, "-m", f"peers.{peer.worker}", json.dumps(setting)]
            workers[name, env_id] = Worker(command, log)
        labels = {"kind": kind, "task": env_id, "who": name} | labels
        turns.append((workers[name, env_id], wanted, labels))

    for kind in ("sac", "model", "rollout"):
        for env_id in ENVS if kind in options.only else []:
            for name, peer in contenders.items():
                if kind in peer.kinds:
                    turn(kind, env_id, name, peer, kind)
            if kind != "rollout":
                more = {"who": PRODUCTS, "gflop": products(kind, *sizes[env_id].values())[1] / 1e9}
                turn(kind, env_id, "ours", contenders["ours"], f"{kind} products", **more)
    if "steps" in options.only:
        turn("env", ENVS[0], "ours", contenders["ours"], "env")
        for name in SCRIPTS:
            peer, more = Peer("ours", (), {"script": name}), {"task": f"{name}.py", "who": "ours"}
            turn("steps", ENVS[0], f"{name}.py", peer, "steps", **more)
    return turns


def measure(options: Options) -> None:
    """Gets everything ready, then measures round by round; writes all files after each."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none here; take --device cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    if hasattr(os, "sched_setaffinity"):  # all contenders get these cores, whatever they use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    records, workers = [], {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # to compile anew
        stack.callback(lambda: [worker.close() for worker in workers.values()])
        turns = plan(options, folder, workers)
        bar = stack.enter_context(tqdm(total=(options.rounds + 1) * len(turns), unit="turn"))
        for number in range(options.rounds + 1):  # in round 0 each sets its task up
            for worker, task, labels in turns:
                bar.set_postfix_str(f"round {number}: {labels['who']}, {labels['task']}, {task}")
                seconds = {"seconds": options.seconds} if number else {}
                records.append({"round": number} | labels | worker.ask(task=task, **seconds))
                bar.update()
            if number:
                write(complete(pd.DataFrame(records)), options)
    print((options.out / f"{options.device}.md").read_text())


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds rates, and that of steps from mbrl-lib's parts with as many updates as ours made."""
    frame = frame.reindex(columns=COLUMNS)
    frame["rate"] = (frame["count"] / frame.seconds).where(frame["round"] > 0)
    run = frame[(frame.kind == "steps") & (frame.task == "mbpo_ftfl.py")].set_index("round")
    env = rates(frame, "env", ENVS[0], "ours")
    sac, model, rollout = (rates(frame, k, ENVS[0], "mbrl-lib") for k in [*KINDS][:3])
    updates = run.sac_updates / sac + run.model_updates / model
    step = (1 / env + updates / run["count"] + 400 / rollout).dropna()
    parts = {"round": step.index, "kind": "steps", "task": "mbpo_ftfl.py", "who": PARTS}
    return pd.concat([frame, pd.DataFrame(parts | {"rate": 1 / step.array})], ignore_index=True)


def rates(frame: pd.DataFrame, *key: str) -> pd.Series:
    """Rates by round of one (kind, task, who); empty where there are none."""
    mine = (frame[LABELS] == [*key]).all(axis=1) & frame.rate.notna()
    return frame[mine].set_index("round").rate.astype(float)


def spread(values: pd.Series, unit: str = "") -> dict:
    """Median and range of what was measured, as two cells."""
    numbers = values.median(), values.min(), values.max()
    cells = [f"{x:,.0f}{unit}" if abs(x) >= 100 or unit else f"{x:.3g}" for x in numbers]
    told = (cells[0], f"{cells[1]} to {cells[2]}") if len(values) else ("", "")
    return dict(zip(("median", "range"), told, strict=True))


def tables(frame: pd.DataFrame) -> str:
    """Two tables in Markdown: rates, with ours over the others' round by round; and shares."""
    lines, shares = [], []
    for (kind, task, who), part in frame.groupby(LABELS, sort=False):
        measured, ours = (rates(frame, kind, task, name) for name in (who, "ours"))
        ratio = (ours / measured).dropna() if who != "ours" else measured[:0]
        named = part.version.dropna().unique() if who not in ("ours", PRODUCTS) else ()
        failed, start = part.error.dropna(), part[part["round"] == 0].seconds
        over = dict(zip(("ours over it", "its range"), spread(ratio).values(), strict=True))
        if len(failed):
            over["ours over it"] = failed.iloc[0]
        line = {"per second": KINDS[kind], "task": task, "who": " ".join([who, *named])}
        lines.append(line | spread(measured) | over | {"start, s": start.max()})
        if who == PRODUCTS and len(ratio):
            one, speed = part.gflop.iloc[0], spread(measured * part.gflop.iloc[0])["median"]
            name = f"{KINDS[kind]}, {one:.2f} GFLOP each, of {speed} GFLOP/s that products reach"
            shares.append({"share": name, "task": task} | spread(100 * ratio, " %"))
    for script, part in frame[(frame.kind == "steps") & (frame.who == "ours")].groupby("task"):
        part, spent = part[part["round"] > 0].set_index("round"), 0
        for kind in ("sac", "model"):
            spent += part[f"{kind}_updates"] / rates(frame, kind, ENVS[0], "ours")
        if len(rest := (1 - spent / part.seconds).dropna()):
            name = "time of a step besides SAC and model updates"
            shares.append({"share": name, "task": script} | spread(100 * rest, " %"))
    return "\n\n".join(markdown(pd.DataFrame(rows)) for rows in (lines, shares) if rows)


def draw(frame: pd.DataFrame, title: str, path: Path) -> None:
    """A bar for each rate, as high as the median, with its range."""
    bars = {"kind": "bar", "x": "task", "y": "rate", "hue": "who", "col": "kind"}
    bars |= {"estimator": "median", "errorbar": ("pi", 100), "sharex": False, "sharey": False}
    grid = sns.catplot(frame[(frame.kind != "env") & frame.rate.notna()], **bars)
    for kind, axis in grid.axes_dict.items():
        axis.set(title=f"{KINDS[kind]} per second", xlabel="", ylabel="")
        axis.tick_params("x", rotation=20 if kind == "steps" else 0)
    grid.figure.suptitle(title, y=1.02)
    grid.savefig(path)
    plt.close(grid.figure)


def write(frame: pd.DataFrame, options: Options) -> None:
    """Writes CSV, table and chart, each in one step."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    if options.device == "cpu" and (told := Path("/proc/cpuinfo")).exists():
        device = re.search(r"model name\s*: (.*)|$", told.read_text())[1] or device
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    title = f"{device}, {threads}, torch {torch.__version__}"
    if preloaded := os.environ.get("LD_PRELOAD"):
        title += f", {Path(preloaded).name} preloaded"
    text = f"**{title}**, {frame['round'].max()} rounds of {options.seconds:g} s each"
    for suffix, save in {
        "csv": lambda path: frame.to_csv(path, index=False, float_format="%.6g"),
        "md": lambda path: path.write_text(f"{text}\n\n{tables(frame)}\n\n{NOTES}"),
        "png": lambda path: draw(frame, title, path),
    }.items():
        temporary = options.out / f".{options.device}.{suffix}"
        save(temporary)
        temporary.replace(options.out / f"{options.device}.{suffix}")


if __name__ == "__main__":
    run_tool(measure, Options, __doc__)
