"""What this machine does per second with our updates and runs, and with those of peers.

    python benchmarks/throughput.py --only sac --peers sbx    SAC updates, beside sbx alone
    python benchmarks/throughput.py --pythons sbx ~/sbx/bin/python mbrl-lib ~/mbrl/bin/python
    python benchmarks/throughput.py --variants                what each choice in ours is worth

Every contender is a process of its own (benchmarks/peers/), idle but in its turn; in every round
all have one, so that whatever else the machine does hits all alike. A peer runs in this Python or
in another (benchmarks/README.md); one that is not installed there, or fails, is a line in the
table. Written after every round: [variants_]cpu.csv or cuda.csv, a line per turn; .md from it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from common import RESULTS, ROOT, InputError, markdown, run_tool
from held import FIT_EVERY, FIT_UPDATES
from peers.ours import VARIANTS
from tqdm import tqdm

KINDS = {"sac": "SAC updates", "model": "model updates"}
KINDS |= {"rollout": "rollout transitions", "steps": "steps of a run"}
MODULES = {"stable-baselines3": "stable", "sbx": "stable", "mbrl-lib": "mbrl_lib"}  # of the peers
ALL, UPDATES = ("sac", "model", "rollout"), ("sac", "model")
OFFERS = {"ours": ALL, "stable-baselines3": ("sac",), "sbx": ("sac",), "mbrl-lib": ALL}
OFFERS |= dict.fromkeys(VARIANTS, UPDATES)
SIZES = {"dmc/walker-run": {"obs": 24, "action": 6}, "dmc/humanoid-walk": {"obs": 67, "action": 21}}
WALKER, SCRIPTS = "dmc/walker-run", ["sac", "mbpo", "mbpo_ftfl", "mbpo_residual_ablation"]
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
COLUMNS = ["round", "kind", "task", "who", "version", "rate", "error"]
NOTES = f"""\
SAC: batches of 256, two hidden layers of 256. Models: 7 members, four hidden layers of 200, batches
of 256. Rollouts: 400 branches of one step. Ours are made by runs, of 100 SAC updates or 200 of the
model per step. Steps of a run: walker-run, the defaults but for evaluations and checkpoints, which
are off, and fits, {FIT_UPDATES} updates every {FIT_EVERY} steps. Ratios are taken round by round.
"""


@dataclass
class Options:
    rounds: int = 7  # rounds, in each of which all have a turn
    seconds: float = 3.0  # seconds of a turn at least
    threads: int = 2  # CPU cores and threads of each contender
    only: tuple[Literal[tuple(KINDS)], ...] = tuple(KINDS)  # what is measured
    peers: tuple[Literal[tuple(MODULES)], ...] = tuple(MODULES)  # beside whom
    variants: bool = False  # variants of our updates instead of peers
    device: Literal[DEVICES] = DEVICES[0]  # where it is measured
    out: Path = RESULTS / "throughput"  # folder of the results
    pythons: dict[Literal[tuple(MODULES)], str] = field(default_factory=dict)  # of peers


class Contender(subprocess.Popen):
    """The process that a turn of `plan` is for, making ready; it ends when its stdin does."""

    def __init__(self, turn: dict, pythons: dict[str, str]):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        python, module = pythons.get(turn["who"], sys.executable), MODULES.get(turn["who"], "ours")
        command = [python, "-m", f"peers.{module}", json.dumps(turn)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        super().__init__(command, bufsize=0, cwd=ROOT / "benchmarks", **pipes)

    def ask(self, seconds: float) -> dict:
        """Version and rate, after a turn of so many seconds; if it has ended, why, as error."""
        with suppress(BrokenPipeError):
            self.stdin.write(f"{seconds}\n".encode())
        if line := self.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        return {"error": (self.log.read() or "it ended without a word").splitlines()[-1]}


def plan(options: Options) -> list[dict]:
    """What each contender is told, in the order of their turns; the first of a kind is ours."""
    contenders = VARIANTS if options.variants else ["ours", *options.peers]
    turns = [
        {"kind": kind, "task": env_id, "who": who, "env_id": env_id} | sizes
        for kind in options.only
        for env_id, sizes in SIZES.items()
        for who in contenders
        if kind in OFFERS[who] and (env_id == WALKER or not options.variants)
    ]
    if "steps" in options.only and not options.variants:
        told = {"kind": "steps", "who": "ours", "env_id": WALKER}
        turns += [told | {"task": f"{script}.py"} for script in SCRIPTS]
    return [turn | {"device": options.device} for turn in turns]


def measure(options: Options) -> None:
    """Gets everyone ready, then measures round by round; writes all files after each."""
    if options.rounds < 1 or not (turns := plan(options)):
        raise InputError("nothing to do: --rounds is less than 1, or --variants without updates")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if hasattr(os, "sched_setaffinity"):  # all get these cores, whatever they use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    records = []
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(turn, options.pythons)) for turn in turns]
        for contender in tqdm(contenders, "getting ready"):  # all at once
            contender.ask(0)
        for number in range(1, options.rounds + 1):
            for turn, contender in zip(tqdm(turns, f"round {number}"), contenders, strict=True):
                records.append({"round": number} | turn | contender.ask(options.seconds))
            text = write(pd.DataFrame(records).reindex(columns=COLUMNS), options)
    print(text)


def table(frame: pd.DataFrame) -> str:
    """Rates in Markdown, and those of the first of a kind over the others', round by round."""
    rates = frame.groupby(["round", "kind", "task"]).rate
    frame = frame.assign(ratio=rates.transform(lambda x: x.iloc[0]) / frame.rate)
    parts = frame.replace({"kind": KINDS}).groupby(["kind", "task", "who"], sort=False)
    spread = parts[["rate", "ratio"]].agg(["median", "min", "max"])
    spread.columns = ["per second", "min", "max", f"{frame.who[0]} over it", "its min", "its max"]
    lines = parts[["version"]].last().join(spread).join(parts[["error"]].last())
    return markdown(lines.dropna(axis=1, how="all").reset_index())


def write(frame: pd.DataFrame, options: Options) -> str:
    """Writes CSV and table; returns the latter."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    if options.device == "cpu" and (told := Path("/proc/cpuinfo")).exists():
        device = re.search(r"model name\s*: (.*)|$", told.read_text())[1] or device
    title = f"{device}, threads: {options.threads}, torch {torch.__version__}"
    text = f"**{title}**, {frame['round'].max()} rounds of {options.seconds:g} s each\n\n"
    text += f"{table(frame)}\n\n{NOTES}"
    path = options.out / f"{'variants_' if options.variants else ''}{options.device}"
    frame.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    run_tool(measure, Options, __doc__)
