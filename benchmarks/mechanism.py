"""Why MBPO fails where it fails: the scales of a model's targets, and how well it fits each kind.

    python benchmarks/mechanism.py                                    all fourteen tasks
    python benchmarks/mechanism.py --tasks Hopper-v5 dmc/walker-run   two of them
    python benchmarks/mechanism.py --checkpoints runs/dmc-walker-run__mbpo_ftfl__1
    python benchmarks/mechanism.py updates-needed --buffers runs/dmc-walker-run__sac__1

The first two gather transitions of a uniform random policy, the third also of a trained one. The
last asks how many updates each target needs: it fits three of the six cells ten times as long, on
random transitions of three tasks and on those that the named runs hold in their replay buffers.

One network of the scripts' ensemble learns from N transitions (s, a, r, s'), as in the scripts but
without early stopping, in six cells. In all of them a baseline b is subtracted that is linear,

    target        y = ([s', r] - b - m) / d,       b = [s, a, 1] W
    prediction    [s', r] = b + m + d N(mu(x), sigma^2(x)),   x = (s, a) at unit scale

    raw           m = 0, d = 1
    normalized    m and d: mean and standard deviation of [s', r] - b
    residual      b = [s, 0]                       raw: mbpo.py; normalized: the ablation
    direct        b = 0                            normalized: mbpo_ftfl.py
    per-dimension b = [w * s + c, 0]               w, c: least squares of s'_i on s_i, each i
    ridge         b = B [s, a, 1]                  B: ridge regression of s' and r on s, a and 1

W, m, d and the scale of x come from the training split. On the holdout, in each dimension i, with
the variance V_i of s' or of r over all N transitions as the unit that all cells share:

    error         E[(b + m + d mu - [s', r])_i^2] / V_i     of the mean prediction
    sampled       error + E[(d sigma)_i^2] / V_i            expected of the sample that rollouts use
    spread        sqrt(E[(d sigma)_i^2] / (V_i error))      predicted over actual; 1 is calibrated

States count by the mean over their dimensions; `change` is the same in units of Var(s'_i - s_i),
in which to predict s' = s is an error near 1. Dimensions that never change are left out.
`updates-needed` splits the change into slow dimensions, Var(s'_i - s_i) < 0.1 Var(s_i), and fast.

Finished tasks (with `updates-needed`, finished fits) are kept in OUT/*.csv and skipped when the
command is given again; OUT/*.md and OUT/*.png are made from these files alone, of all that they
hold.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import joblib
import numpy as np
import pandas as pd
from common import RESULTS, InputError, load_task, run_tool
from mechanism_fit import CELLS, DataSet, fit_all, fit_one, load_run, mbrl, read_buffer
from mechanism_report import present, present_needed
from tqdm import tqdm

SUITE = "hopper-hop hopper-stand humanoid-stand humanoid-walk humanoid-run quadruped-run"
SUITE += " quadruped-walk walker-run cheetah-run"
TASKS = (*(f"dmc/{task}" for task in SUITE.split()), "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")
TASKS += ("Ant-v5", "Humanoid-v5")
FILES = ("dimensions", "fits", "scales")  # OUT/*.csv
KEY = ["task", "data", "lr", "seed", "cell"]  # of one fit of `updates-needed`


@dataclass
class Options:
    tasks: tuple[str, ...] = TASKS  # tasks to fit on transitions of a uniform random policy
    checkpoints: tuple[Path, ...] = ()  # run folders of the scripts: their policies' transitions
    jobs: int = 2  # tasks at a time, one process with one thread each
    transitions: int = 20_000  # transitions of each task and policy
    budgets: tuple[int, ...] = (300, 1000, 3000)  # gradient steps after which a fit is measured
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of split, bootstrap sample, weights and batches
    hidden: int = 200  # units in each of the network's four hidden layers
    out: Path = RESULTS / "mechanism"  # folder of the results
    compile: bool = True  # compile the update with torch.compile

    def settings(self) -> dict[str, str]:
        """What decides the figures, in words, as scales.csv has it."""
        values = {name: getattr(self, name) for name in ("transitions", "hidden")}
        values |= {name: " ".join(map(str, getattr(self, name))) for name in ("budgets", "seeds")}
        return {name: str(value) for name, value in values.items()}


@dataclass
class Needed(Options):
    """Options of `updates-needed`."""

    buffers: tuple[Path, ...] = ()  # run folders of the scripts, for the first rows of their buffer
    tasks: tuple[str, ...] = ("dmc/humanoid-stand", "dmc/hopper-stand", "Hopper-v5")  # random ones
    cells: tuple[Literal[tuple(CELLS)], ...] = (CELLS[2], CELLS[3], CELLS[5])  # what is predicted
    lr: tuple[float, ...] = (mbrl.Args.model_lr,)  # Adam step sizes; here the scripts'
    budgets: tuple[int, ...] = (500, 1000, 2000, 3000, 5000, 8000, 12_000, 20_000, 30_000)
    seeds: tuple[int, ...] = (1, 2)  # seeds of split, bootstrap sample, weights and batches
    out: Path = RESULTS / "updates_needed"  # folder of the results


def data_sets(options: Options, folders: tuple[Path, ...], buffer: bool) -> list[DataSet]:
    """What the options name; InputError for numbers, tasks or folders that are no such thing."""
    for name, least in {
        "jobs": 1,
        "transitions": 10,
        "hidden": 1,
        "budgets": 1,
        "seeds": 0,
    }.items():
        values = np.atleast_1d(getattr(options, name))
        if not len(values) or values.min() < least:
            raise InputError(f"--{name} must be at least {least}")
    sets = []
    for task in options.tasks:
        load_task(task)
        mbrl.make_env(task).close()
        sets.append(DataSet(task, "random", 0, None))
    for folder in folders:
        run = load_run(folder)
        if buffer:
            read_buffer(folder, options.transitions)
        sets.append(DataSet(run.task, folder.resolve().name, run.steps, folder.resolve(), buffer))
    if not sets:
        raise InputError("name a task or a run folder")
    return list(dict.fromkeys(sets))


def in_processes(calls: list, options: Options) -> Iterator:
    """What the calls return, each once it is done, of so many processes at a time."""
    options.out.mkdir(parents=True, exist_ok=True)
    pool = joblib.Parallel(options.jobs, return_as="generator_unordered")
    return tqdm(pool(calls), total=len(calls), disable=None)


def read(file: Path, **types: type) -> pd.DataFrame:
    """A CSV file, or a table without rows where there is none."""
    return pd.read_csv(file, dtype=types) if file.exists() else pd.DataFrame(columns=[*types])


def write(table: pd.DataFrame, order: list[str], file: Path) -> None:
    """Replaces a CSV file by the sorted table, in one step."""
    text = table.sort_values(order, kind="stable").to_csv(index=False, float_format="%.6g")
    file.with_suffix(".tmp").write_text(text)
    file.with_suffix(".tmp").replace(file)


def refuse_others(held: pd.DataFrame, options: Options) -> None:
    """InputError if what is held was made with other settings."""
    for name, value in options.settings().items():
        if name in held and (other := {*held[name].astype(str)} - {value}):
            fault = f"holds results with {name} {min(other)}, not {value}: choose another"
            raise InputError(f"--out {options.out} {fault}")


def run(options: Options) -> None:
    """Fits what is left to do, each task kept when finished, and presents all there is."""
    words = dict.fromkeys(["task", "data", *options.settings()], str)
    held = {name: read(options.out / f"{name}.csv", **words) for name in FILES}
    refuse_others(held["scales"], options)
    done = {*zip(held["scales"].task, held["scales"].data, strict=True)}
    for name, table in held.items():  # less what a task that was cut off has left there
        held[name] = table[[pair in done for pair in zip(table.task, table.data, strict=True)]]
    sets = data_sets(options, options.checkpoints, buffer=False)
    calls = [joblib.delayed(fit_all)(one, options) for one in sets if one[:2] not in done]
    for parts in in_processes(calls, options):
        for name in FILES:  # scales.csv, which says that a task is done, is the last
            held[name] = pd.concat([part for part in (held[name], parts[name]) if len(part)])
            write(held[name], ["task", "data"], options.out / f"{name}.csv")
    present(*(read(options.out / f"{name}.csv", **words) for name in FILES), options.out)


def run_needed(options: Needed) -> None:
    """Fits what is left to do, each fit kept when finished, and presents all there are."""
    file, types = options.out / "fits.csv", dict.fromkeys([*KEY, "updates"], str)
    held = read(file, **types | {"seed": int, "updates": int})
    budgets = " ".join(map(str, sorted({*held.updates} - {0})))
    refuse_others(held.assign(budgets=budgets), options)
    done = {*held[KEY].itertuples(index=False, name=None)}
    calls = [
        joblib.delayed(fit_one)(one, *fit, options)
        for one in data_sets(options, options.buffers, buffer=True)
        for fit in product([f"{lr:g}" for lr in options.lr], options.seeds, options.cells)
        if (*one[:2], *fit) not in done
    ]
    for rows in in_processes(calls, options):
        held = pd.concat([part for part in (held, rows) if len(part)])
        write(held, [*KEY, "updates"], file)
    present_needed(held, options.out)


def main(words: list[str] | None = None) -> None:
    """Does what the command line says."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["updates-needed"]:
        prog = "mechanism.py updates-needed"
        return run_tool(run_needed, Needed, __doc__, words[1:], prog=prog)
    run_tool(run, Options, __doc__, words)


if __name__ == "__main__":
    main()
