"""Why MBPO fails where it fails: the scales of a model's targets, and how well it fits each kind.

    python benchmarks/mechanism.py --checkpoints RUN              random and trained policies
    python benchmarks/mechanism.py updates-needed --buffers RUN   ten times as many updates

One network of the scripts' ensemble learns from N transitions (s, a, r, s'), in batches of shuffled
epochs, in six cells. In all of them a baseline b is subtracted that is linear in [s, a, 1]:

    target        y = ([s', r] - b - m) / d
    prediction    [s', r] = b + m + d N(mu(x), sigma^2(x)),   x = (s, a) at unit scale

    raw           m = 0, d = 1
    normalized    m and d: mean and standard deviation of [s', r] - b
    residual      b = [s, 0]                       raw: mbpo.py; normalized: the ablation
    direct        b = 0                            normalized: mbpo_ftfl.py
    per-dimension b = w * [s, 0] + c               w, c: least squares of s'_i on s_i, each i
    ridge         b = B [s, a, 1]                  B: ridge regression of s' and r on s, a and 1

b, m, d and the scale of x come from the training split. On the holdout, in each dimension i, with
the variance V_i of s' or of r over all N transitions as the unit that all cells share:

    error         E[(b + m + d mu - [s', r])_i^2] / V_i     of the mean prediction
    sampled       error + E[(d sigma)_i^2] / V_i            expected of the sample that rollouts use

Parts are the reward; the state, the mean over its dimensions; the change, which is the state in
units of Var(s'_i - s_i), so that s' = s has an error near 1; and of the change the slow dimensions,
Var(s'_i - s_i) < 0.1 Var(s_i), and the fast. Dimensions that never change are left out.

Finished fits are kept in OUT/*.csv and not made again; OUT/*.md and OUT/*.png show all these hold.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import joblib
import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import RESULTS, InputError, load_task, markdown, run_tool
from mechanism_fit import CELLS, fit, load_run, mbrl
from tqdm import tqdm
from tyro.conf import arg

matplotlib.use("Agg")  # pictures without a display
SUITE = "hopper-hop hopper-stand humanoid-stand humanoid-walk humanoid-run quadruped-run"
SUITE += " quadruped-walk walker-run cheetah-run cartpole-swingup"
GYM = "Hopper Walker2d HalfCheetah Ant Humanoid"
TASKS = *(f"dmc/{task}" for task in SUITE.split()), *(f"{task}-v5" for task in GYM.split())
STEP = f"{mbrl.Args.model_lr:g}"  # the scripts' Adam step size
KEY = ["task", "data", "lr", "seed", "cell"]  # of a fit
NAMES = {"dimensions": [*KEY, "dimension"], "scales": ["task", "data"], "fits": [*KEY, "updates"]}
PARTS = {"reward": "reward", "state": "state", "change": "change"}
SPEEDS = {"reward": "reward", "slow": "slow dimensions", "fast": "fast dimensions"}
PREDICTS = "the network predicts"
RAW, RAW_DIRECT, RESIDUAL, DIRECT, PER_DIMENSION, RIDGE = CELLS.values()
QUESTIONS = {  # what is predicted, and what it is held against
    "normalize s' - s and r": (RESIDUAL, [RAW]),
    "normalize s' and r": (DIRECT, [RAW_DIRECT]),
    "predict s', not s' - s, both raw": (RAW_DIRECT, [RAW]),
    "predict s', not s' - s, both normalized": (DIRECT, [RESIDUAL]),
    "predict s' normalized, not s' - s raw": (DIRECT, [RAW]),
    "predict s' - w s - c, not the better of s' - s and s'": (PER_DIMENSION, [RESIDUAL, DIRECT]),
    "predict what ridge regression leaves, not the better of these": (RIDGE, [RESIDUAL, DIRECT]),
}


@dataclass
class Options:
    tasks: tuple[str, ...] = TASKS  # tasks to fit on transitions of a uniform random policy
    runs: Annotated[tuple[Path, ...], arg(name="checkpoints")] = ()  # run folders: new transitions
    cells: tuple[Literal[tuple(CELLS)], ...] = tuple(CELLS)  # what is fitted
    budgets: tuple[int, ...] = (300, 1000, 3000)  # gradient steps after which a fit is measured
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of split, bootstrap sample, weights and batches
    lr: tuple[float, ...] = (mbrl.Args.model_lr,)  # Adam step sizes; here the scripts'
    transitions: int = 20_000  # transitions of each data set
    jobs: int = 2  # fits at a time, one process with one thread each
    compile: bool = True  # compile the update with torch.compile
    out: Path = RESULTS / "mechanism"  # folder of the results
    buffer: ClassVar[bool] = False  # whether a run stands for its replay buffer


@dataclass
class Needed(Options):
    tasks: tuple[str, ...] = ("dmc/humanoid-stand", "dmc/hopper-stand", "Hopper-v5")  # random ones
    runs: Annotated[tuple[Path, ...], arg(name="buffers")] = ()  # run folders: their first rows
    cells: tuple[Literal[tuple(CELLS)], ...] = tuple(CELLS)[2:4] + tuple(CELLS)[5:]  # fitted
    budgets: tuple[int, ...] = (500, 1000, 2000, 3000, 5000, 8000, 12_000, 20_000, 30_000)  # steps
    seeds: tuple[int, ...] = (1, 2)  # seeds of split, bootstrap sample, weights and batches
    out: Path = RESULTS / "updates_needed"  # folder of the results
    buffer: ClassVar[bool] = True


def data_sets(options: Options) -> list[tuple[str, Path | None]]:
    """Task and run folder of each; InputError for numbers, tasks or folders that are no such."""
    least = {"jobs": 1, "transitions": 10, "budgets": 1, "seeds": 0, "lr": 0}
    for name, bound in least.items():
        if min(np.atleast_1d(getattr(options, name)), default=-1) < bound:
            raise InputError(f"--{name} must be at least {bound}")
    for task in options.tasks:
        load_task(task)
        mbrl.make_env(task).close()
    sets = [(task, None) for task in options.tasks]
    for folder in map(Path.resolve, options.runs):
        task, _, rows = load_run(folder)
        if options.buffer and len(rows) < options.transitions:
            raise InputError(f"{folder} holds {len(rows)} transitions, not {options.transitions}")
        sets.append((task, folder))
    if not sets:
        raise InputError("name a task or a run folder")
    return [*dict.fromkeys(sets)]


def read(file: Path) -> pd.DataFrame:
    """A CSV file, or a table without rows."""
    if file.exists():
        return pd.read_csv(file, dtype={"lr": str})
    return pd.DataFrame(columns=[*NAMES[file.stem], "transitions"])


def add(rows: pd.DataFrame, file: Path) -> None:
    """Adds rows to a CSV file, in the place of those of the same names, in one step."""
    names = NAMES[file.stem]
    table = pd.concat([part for part in (read(file), rows) if len(part)])
    table = table.drop_duplicates(names, keep="last").set_index(names).sort_index()
    file.with_suffix(".tmp").write_text(table.to_csv(float_format="%.6g"))
    file.with_suffix(".tmp").replace(file)


def read_errors(out: Path, parts: dict[str, str], of_runs: str) -> pd.DataFrame:
    """The sampled errors of these parts, a row each, with words for data sets and targets."""
    fits = read(out / "fits.csv").query("updates > 0")
    fits = fits.rename(columns={f"{part}_sampled": word for part, word in parts.items()})
    run = fits.data.where(fits.data != "random")
    several = run.groupby(fits.task).transform("nunique") > 1
    source = np.where(several, of_runs + " (" + fits.data + ")", of_runs)
    step = np.where(fits.lr == STEP, "", ", lr " + fits.lr)
    fits["data set"] = fits.task + ", " + np.where(run.isna(), "random policy", source) + step
    fits["policy"] = np.where(run.isna(), "random", "trained")
    used = [word for cell, word in CELLS.items() if cell in {*fits.cell}]
    fits[PREDICTS] = pd.Categorical(fits.cell.map(CELLS), used)
    index = ["policy", "data set", PREDICTS, "seed", "updates"]
    errors = fits.melt(index, [*parts.values()], "error of", "sampled error").dropna()
    return errors.sort_values("data set", kind="stable")


def factors(errors: pd.DataFrame, target: str, others: list[str]) -> pd.Series:
    """Error with a target over the least with others, means of the seeds that have them all."""
    index = ["policy", "data set", "error of", "updates"]
    wide = errors.pivot(index=[*index, "seed"], columns=PREDICTS, values="sampled error")
    wide = wide.reindex(columns=[target, *others]).dropna().groupby(level=index).mean()
    return wide[target] / wide[others].min(axis=1)


def counted(factors: pd.Series) -> str:
    """How many errors are lower, and in brackets the median factor."""
    return f"{(factors < 1).sum()} of {len(factors)} ({factors.median():.2g})"


def until(factors: pd.Series) -> str:
    """When factors are first at most 1.1, when below 0.9, and the last: 500 / 8,000 (0.52)."""
    updates = factors.index.get_level_values("updates")
    found = [updates[holds] for holds in (factors <= 1.1, factors < 0.9)]
    firsts = " / ".join(f"{first[0]:,}" if len(first) else "never" for first in found)
    return f"{firsts} ({factors.iloc[-1]:.2f})"


def all_errors(errors: pd.DataFrame) -> str:
    """The sampled errors of all data sets, means over seeds."""
    index = ["data set", "error of", "updates"]
    table = errors.pivot_table("sampled error", index, PREDICTS, observed=True)
    return markdown(table.reset_index())


def draw(errors: pd.DataFrame, file: Path) -> None:
    """Errors by updates, a panel for each data set and part: means, and the range of the seeds."""
    errors = errors.assign(panel=errors["data set"] + "\n" + errors["error of"])
    lines = {"x": "updates", "y": "sampled error", "hue": PREDICTS, "style": PREDICTS}
    how = {"kind": "line", "errorbar": ("pi", 100), "facet_kws": {"sharey": False}}
    grid = sns.relplot(errors, col="panel", col_wrap=3, height=2.6, aspect=1.3, **lines, **how)
    grid.set(xscale="log", yscale="log", xlabel="gradient steps").refline(y=1, lw=0.7)
    grid.tick_params(axis="x", which="minor", labelbottom=False)
    sns.move_legend(grid, "lower center", bbox_to_anchor=(0.4, 1), ncol=3)
    grid.set_titles("{col_name}").savefig(file, dpi=100)


def present(out: Path) -> None:
    """Writes summary.md, tables.md and the pictures."""
    errors = read_errors(out, PARTS, "trained policy")
    last = errors[errors.updates == errors.updates.max()]
    parts = {question: factors(last, *cells) for question, cells in QUESTIONS.items()}
    parts = {q: each.groupby(["policy", "error of"]).agg(counted) for q, each in parts.items()}
    table = pd.DataFrame(parts).T.rename_axis("to ...")
    table.columns = [f"{part}, {policy} policy" for policy, part in table.columns]
    text = f"On how many data sets it lowers the sampled error after {max(last.updates):,} "
    text += f"updates\n(in brackets the median factor):\n\n{markdown(table.reset_index())}\n"
    (out / "summary.md").write_text(text)
    (out / "tables.md").write_text(all_errors(errors) + "\n")
    for part, rows in errors.groupby("error of"):
        draw(rows, out / f"errors_{part}.png")


def present_needed(out: Path) -> None:
    """Writes summary.md, needed.md and needed.png."""
    errors = read_errors(out, SPEEDS, "along training")
    ratios = {target: factors(errors, target, [RESIDUAL]) for target in (DIRECT, RIDGE)}
    index = ["data set", PREDICTS, "error of"]
    words = pd.concat(ratios, names=[PREDICTS]).groupby(index).agg(until)
    table = words.unstack().reindex(columns=SPEEDS.values())
    table["seeds"] = errors.groupby(index[:2], observed=True).seed.nunique()
    text = "Updates until the sampled error is at most 10 % above that of predicting s' - s /\n"
    text += "until it is more than 10 % below, each the first tried, even if later ones undo it\n"
    text += "(in brackets: the last ratio). All at unit scale; slow: Var(s' - s) < 0.1 Var(s).\n\n"
    (out / "summary.md").write_text(f"{text}{markdown(table.reset_index())}\n")
    (out / "needed.md").write_text(all_errors(errors) + "\n")
    draw(errors, out / "needed.png")


def run(options: Options) -> None:
    """Makes the fits that are left to do, keeps each when finished, and presents all there are."""
    held = read(options.out / "fits.csv")
    made = {"transitions": {*held.transitions}, "budgets": {*held.updates} - {0}}
    for name, values in made.items():
        if values and values != {*np.atleast_1d(getattr(options, name))}:
            raise InputError(f"--out {options.out} is of {name} {sorted(values)}: choose another")
    done = {*held[KEY].itertuples(index=False, name=None)}
    fits = [
        (task, folder, *fit)
        for task, folder in data_sets(options)
        for fit in product([f"{lr:g}" for lr in options.lr], options.seeds, options.cells)
        if (task, folder.name if folder else "random", *fit) not in done
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    pool = joblib.Parallel(options.jobs, return_as="generator_unordered")
    results = pool(joblib.delayed(fit)(*one, options) for one in fits)
    for tables in tqdm(results, total=len(fits), disable=None):
        for name, rows in tables.items():
            add(rows, options.out / f"{name}.csv")
    (present_needed if options.buffer else present)(options.out)


if __name__ == "__main__":
    needed = sys.argv[1:2] == ["updates-needed"]
    run_tool(run, Needed if needed else Options, __doc__, sys.argv[1 + needed :])
