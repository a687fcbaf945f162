"""Tables and figures of recorded runs beside published ones; the generated parts of README.md.

    python benchmarks/report.py            prints the tables of benchmarks/results
    python benchmarks/report.py --write    renews the READMEs' generated parts and the figures
    python benchmarks/report.py --check    names READMEs out of date (exit code 1)
    python benchmarks/report.py --record runs/dmc-walker-run__mbpo__*
    python benchmarks/report.py --results runs --write    writes runs/report.md and runs/figures/

A recorded run is a folder <env id>__<experiment>__<seed>/ with args.json, eval.csv and scalars.csv;
a run's own folder, with TensorBoard events for scalars.csv, will do as well. Intervals: the middle
95 % of 10,000 bootstrap samples, which draw seeds with replacement (Agarwal et al. 2021, arXiv
2108.13264). One seed gives none: [-].
"""

import ast
import hashlib
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import diffs
import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import RESULTS, ROOT, InputError, markdown, run_tool
from scipy.stats import bootstrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # figures without a display
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was resumed
OTHER_CODE = "\n\n† Some of these runs were made by other code than that of today's script."
PAIR = "mbpo_ftfl", "sac_utd10"  # experiments whose returns are compared seed by seed
FIRST = "dmc/walker-run", "dmc/quadruped-walk"  # tasks on the README's first screen
COLOURS = {"mbpo_residual": "tab:green", "mbpo_ftfl": "tab:red", "mbpo": "tab:blue"}  # by title
COLOURS |= {"raw": "tab:purple", "sac_utd1,": "tab:gray", "sac_": "tab:orange", "": "tab:brown"}
DASHES = "", (6, 2), (3, 2), (1, 1), (6, 2, 1, 2), (6, 2, 1, 2, 1, 2)  # of runs of one colour
TRAINING = {  # tags in the figure of training: what they show, and the scale of the axis
    "eval/critic_bias": ("critic bias", "symlog"),
    "model/reward_error": ("reward error / variance", "log"),
    "model/reward_std_ratio": ("reward spread, predicted / real", "log"),
    "model/change_error_mean": ("state error / variance of s' - s", "log"),
}


@dataclass
class Options:
    write: bool = False  # renew the document and the figures
    check: bool = False  # name documents that are out of date
    record: tuple[Path, ...] = ()  # run folders to copy into the folder of results
    unfinished: bool = False  # record runs that were cut off as well, as far as they got
    results: Path = RESULTS  # folder of runs


def read_events(folder: Path) -> pd.DataFrame:
    """The scalars among a run's TensorBoard events: columns step, tag, value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    rows = [(event.step, tag, event.value) for tag in tags for event in events.Scalars(tag)]
    return pd.DataFrame(rows, columns=["step", "tag", "value"]).sort_values(["step", "tag"])


def read_run(folder: Path) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """Settings, evaluations (step, mean, ...) and scalars (step, tag, value) of a run."""
    file = folder / "args.json"
    try:
        args = json.loads(file.read_text())
        file = folder / "eval.csv"
        evaluations = pd.read_csv(file).astype({"step": int, "mean": float})
        if evaluations.empty:
            raise ValueError("no evaluation yet")
        file = folder / "scalars.csv"
        scalars = pd.read_csv(file) if file.exists() else read_events(folder)
        return args, evaluations, scalars.astype({"step": int, "tag": str, "value": float})
    except (OSError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} is no run that can be read: {file.name}: {reason}") from None


@cache
def code_of(source: str) -> str:
    """SHA-256 of what Python executes of a script: of no comment, docstring or layout."""

    def plain(node):
        if isinstance(node, ast.AST):  # without what is empty, which differs between Pythons
            parts = ((name, plain(value)) for name, value in ast.iter_fields(node))
            return type(node).__name__, [part for part in parts if part[1] not in (None, [])]
        if not isinstance(node, list):
            return node
        words = (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) for x in node)
        return [plain(x) for x, said in zip(node, words, strict=True) if not said]

    return hashlib.sha256(repr(plain(ast.parse(source))).encode()).hexdigest()


def origin(script: str, source: str) -> dict:
    """Code and commit of the version of a script with this SHA-256; the commit may yet be None."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True)
    log = git(["git", "rev-list", "--all", "--", script]).stdout if shutil.which("git") else b""
    made = [(x, git(["git", "show", f"{x}:./{script}"]).stdout) for x in log.decode().split()]
    for commit, text in [*made, (None, diffs.source_of(script, ROOT).encode())]:
        if hashlib.sha256(text).hexdigest() == source:
            return {"code": code_of(text.decode()), "commit": commit}
    return {}


def load(results: Path) -> pd.DataFrame:
    """Every run under a folder, long: task, run (its title), length, seed, step, tag, value.

    Tasks of FIRST come first. † stands behind a title if other code than today's ran a seed of it.
    """
    frames = []
    for file in sorted(results.glob("*__*__*/eval.csv")):
        args, evaluations, scalars = read_run(file.parent)
        returns = evaluations[["step"]].assign(tag="return", value=evaluations["mean"])
        frame = pd.concat([returns, scalars[scalars.tag.isin([*TRAINING, "model/updates"])]])
        updates = args["updates_per_step"]
        title = f"{args['exp_name']}, {updates} update{'s' * (updates > 1)} per step"
        made = args if "code" in args else origin(args["script"], args.get("source", ""))
        mark = "" if made.get("code") == code_of(diffs.source_of(args["script"], ROOT)) else " †"
        names = {"task": args["env_id"], "run": title, "seed": args["seed"], "mark": mark}
        frames.append(frame.assign(**names, length=evaluations.step.max()))
    if not frames:
        raise InputError(f"{results} holds no runs, <env id>__<experiment>__<seed>/eval.csv")
    data = pd.concat(frames, ignore_index=True)
    data["run"] += data.groupby(["task", "run"]).mark.transform("max")
    places = data.task.map(lambda task: (*FIRST, task).index(task))
    return data.drop(columns="mark").loc[places.sort_values(kind="stable").index]


def curves_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By run, the values of one tag on one task: a row per step, a column per seed, or NaN."""
    shape = {"index": "step", "columns": "seed", "values": "value", "aggfunc": "last"}
    return {title: run.pivot_table(**shape) for title, run in rows.groupby("run")}


def published(task: str, end: float = math.inf) -> pd.core.groupby.DataFrameGroupBy:
    """What others report of a task until step `end`; Gymnasium's is quoted without version."""
    figures = pd.read_csv(ROOT / "benchmarks" / "published.csv", dtype={"seeds": "Int64"})
    figures["place"] = pd.factorize(figures.algorithm)[0]
    figures = figures[figures.task.isin([task, task.split("-v")[0]]) & (figures.step <= end)]
    return figures.groupby(["algorithm", "source", "seeds"], sort=False, dropna=False)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds; NaN for one seed."""
    if len(scores) < 2:
        return math.nan, math.nan
    options = {"n_resamples": 10_000, "batch": 1000, "method": "percentile", "rng": 0}
    return tuple(bootstrap([scores], np.mean, **options).confidence_interval)


def cell(curves: pd.DataFrame, step: int) -> str:
    """The mean at a step, its interval, and of how many seeds if not all are there yet."""
    scores = curves.reindex([step]).loc[step].dropna()
    if scores.empty:
        return ""
    numbers = scores.mean(), *interval(scores.to_numpy())
    mean, low, high = (f"{round(x)}" if abs(x) < 1e5 else f"{x:.0e}" for x in numbers)
    some = f" ({len(scores)} of {curves.shape[1]} seeds)" if len(scores) < curves.shape[1] else ""
    return f"{mean} [{'-' if low == 'nan' else f'{low}, {high}'}]{some}"


def paired(curves: dict[str, pd.DataFrame]) -> list[dict]:
    """How far PAIR's first run is ahead of its second, by seed, at the last step of both: rows."""
    lines, (one, other) = [], PAIR
    curves = {title.removesuffix(" †"): run for title, run in curves.items()}
    for title in curves:
        rival = title.replace(f"{one},", f"{other},")
        if rival != title and rival in curves:
            ahead = (curves[title] - curves[rival]).dropna(axis=1, how="all").dropna()
            line = {"run": f"{one} less {other}, paired by seed", "seeds": ahead.shape[1]}
            lines += [line | {f"return at {x:,}": cell(ahead, x)} for x in ahead.index[-1:]]
    return lines


def table(task: str, rows: pd.DataFrame, steps: list[int]) -> str:
    """A Markdown table of a task: returns at these steps, also published ones, what is paired."""
    lines, tags = [], ("return", "eval/critic_bias", "model/updates")
    returns, biases, updates = (curves_of(rows[rows.tag == tag]) for tag in tags)
    for title, curves in returns.items():
        line = {"run": title, "seeds": curves.shape[1]}
        line |= {f"return at {step:,}": cell(curves, step) for step in steps}
        last = max(step for step in steps if step <= curves.index.max())
        line |= {"critic bias": cell(biases.get(title, curves[:0]), last)}
        if fits := updates.get(title, curves[:0]).loc[:last].sum().mean():
            line["model's gradient steps"] = f"{fits:,.0f}"
        lines.append(line)
    lines += paired(returns)
    for (algorithm, source, seeds), points in published(task):
        at = {f"return at {x.step:,}": f"{x.mean} ± {x.std}" for x in points.itertuples()}
        if known := {name: x.removesuffix(" ± nan") for name, x in at.items() if name in lines[0]}:
            lines.append({"run": f"{algorithm} ({source})", "seeds": seeds} | known)
    text = markdown(pd.DataFrame(lines).fillna("").rename(columns={"run": task}))
    return text + OTHER_CODE * any(rows.run.str.endswith("†"))


def tables(data: pd.DataFrame) -> str:
    """A table for every task, at the steps where runs end and half of the last."""
    made = []
    for task, rows in data.groupby("task", sort=False):
        marks = [rows.length.max() / 2, *rows.length.unique()]
        known = rows.step[rows.tag == "return"]
        steps = {min(known, key=lambda step: abs(step - mark)) for mark in marks}
        made.append(table(task, rows, sorted(steps)))
    return "\n\n".join(made)


def first_screen(data: pd.DataFrame) -> pd.DataFrame:
    """What the README begins with: runs of FIRST with several seeds at `end`, where PAIR ends."""
    pair = data[data.task.isin(FIRST) & data.run.str.startswith(tuple(f"{x}," for x in PAIR))]
    rows = data.assign(end=data.task.map(pair.groupby("task").length.min()))
    there = rows.seed.where((rows.tag == "return") & (rows.step == rows.end))
    return rows[there.groupby([rows.task, rows.run]).transform("nunique") > 1]


def summary(data: pd.DataFrame) -> str:
    """A table per task of the README's first screen."""
    tasks = first_screen(data).groupby(["task", "end"], sort=False)
    return "\n\n".join(table(task, rows, [int(end)]) for (task, end), rows in tasks)


def draw_curves(returns: pd.DataFrame) -> sns.FacetGrid:
    """Return by step, as far as ours go: a panel per task, a band of its interval, published."""
    grid = relplot(returns, col="task", col_wrap=min(3, returns.task.nunique()), height=4.2)
    names = [text.get_text() for text in grid.legend.texts]
    shown = dict(zip(names, grid.legend.legend_handles, strict=True))
    for task, axis in grid.axes_dict.items():
        end = 1.04 * returns.step[returns.task == task].max()
        for (algorithm, source, seeds), points in published(task, end):
            curve = points.step, points["mean"], points["std"]
            style = {"fmt": "osD^v"[points.place.iloc[0] % 5], "markersize": 4, "capsize": 3}
            if pd.isna(seeds):  # a level, of no runs
                drawn = axis.axhline(points["mean"].iloc[0], color="0.3", linestyle=":")
            else:
                drawn = axis.errorbar(*curve, color="0.3", **style)
            shown[f"{algorithm}\n({source})"] = drawn
        axis.set(xlim=(None, end), xlabel="environment step")
        axis.locator_params(axis="x", nbins=5)
    grid.legend.remove()
    grid.add_legend(shown).set_ylabels("mean return")
    return grid.set_titles("{col_name}").tight_layout()


def draw_training(scalars: pd.DataFrame) -> sns.FacetGrid:
    """What TRAINING names by environment step, one row of panels per task."""
    tags = [tag for tag in TRAINING if tag in {*scalars.tag}]
    grid = relplot(scalars, row="task", col="tag", col_order=tags, height=3)
    for (task, tag), axis in grid.axes_dict.items():
        name, scale = TRAINING[tag]
        axis.set(title=f"{task}\n{name}", yscale=scale, ylabel="", xlabel="step")
        axis.yaxis.get_major_locator().set_params(numticks=7)
    return grid.tight_layout()


def relplot(rows: pd.DataFrame, **layout) -> sns.FacetGrid:
    """Per run the mean of its seeds, and a band, the 95 % bootstrap interval of that mean."""
    lines = {"x": "step", "y": "value", "hue": "run", "style": "run", "palette": {}, "dashes": {}}
    lines |= {"kind": "line", "errorbar": ("ci", 95), "seed": 0, "err_kws": {"alpha": 0.12}}
    for run in sorted({*rows.run}, key=lambda run: (len(run), run)):  # the first is solid
        colour = next(COLOURS[name] for name in COLOURS if run.startswith(name))
        like = [*lines["palette"].values()].count(colour)
        lines["palette"][run], lines["dashes"][run] = colour, DASHES[min(like, len(DASHES) - 1)]
    return sns.relplot(rows, **lines, facet_kws={"sharex": False, "sharey": False}, **layout)


def figures_of(data: pd.DataFrame) -> dict:
    """What is drawn, {name: (function, rows)}; of a task, runs of several seeds if any are so."""
    seeds = data.groupby(["task", "run"]).seed.transform("nunique")
    several = data[seeds >= seeds.groupby(data.task).transform("max").clip(upper=2)]
    curves = {"curves": several, "first": first_screen(data)}.items()
    figures = {name: (draw_curves, rows[rows.tag == "return"]) for name, rows in curves}
    scalars = several[several.tag != "return"].groupby("task").filter(lambda x: x.run.nunique() > 1)
    figures["training"] = draw_training, scalars
    return {name: (draw, rows) for name, (draw, rows) in figures.items() if len(rows)}


def diff_text(_) -> str:
    """`diff mbpo.py mbpo_ftfl.py` without the hunks of the docstrings at the top."""
    command = ["diff", "mbpo.py", "mbpo_ftfl.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    hunks = re.split(r"^(?=\d)", lines, flags=re.M)
    top = (ROOT / "mbpo.py").read_text().split("\nimport")[0].count("\n")
    shown = [hunk for hunk in hunks if hunk and int(re.match(r"\d+", hunk)[0]) > top]
    return f"```diff\n{''.join(shown)}```"


PARTS = {"summary": summary, "results": tables, "diff": diff_text, "diffs": lambda _: diffs.table()}


def filled(text: str, data: pd.DataFrame) -> str:
    """A README with what stands between <!-- name --> and <!-- /name --> made anew.

    A name that is not in PARTS is that of a file in benchmarks/results/, which another tool wrote.
    """

    def part(found: re.Match) -> str:
        begin, name, end = found.groups()
        file = ROOT / "benchmarks" / "results" / f"{name}.md"
        other = file.read_text().strip() if file.exists() else "Not measured yet."
        return f"{begin}{PARTS[name](data) if name in PARTS else other}\n{end}"

    return re.sub(r"(<!-- (\S+) -->\n).*?(<!-- /\2 -->)", part, text, flags=re.S)


def documents_of(results: Path, data: pd.DataFrame) -> dict[Path, str]:
    """The two READMEs, or report.md beside runs that are not our own, and what they should say."""
    if results.resolve() != ROOT / "benchmarks" / "results":
        figures = "\n".join(f"![{name}](figures/{name}.png)" for name in figures_of(data))
        return {results / "report.md": f"{figures}\n\n{tables(data)}\n"}
    readmes = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    return {path: filled(path.read_text(), data) for path in readmes}


def write(results: Path, data: pd.DataFrame) -> None:
    """Writes the documents and the figures of a folder anew."""
    for path, text in documents_of(results, data).items():
        path.write_text(text)
    (results / "figures").mkdir(exist_ok=True)
    for name, (draw, rows) in figures_of(data).items():
        draw(rows).savefig(results / "figures" / f"{name}.png", metadata={"Software": None})


def record(folders: tuple[Path, ...], results: Path, unfinished: bool = False) -> None:
    """Copies runs into a folder of results; all are read before any is written."""
    runs = {}
    for folder in (folder for folder in folders if folder.name not in ("figures", "report.md")):
        args, evaluations, _ = read_run(folder)
        last, end = evaluations.step.max(), args["total_timesteps"]
        if (scalars := read_events(folder)).empty:
            raise InputError(f"{folder} holds no TensorBoard events: name a run's own folder")
        if last + args["eval_frequency"] <= end and not unfinished:
            remedy = "--resume it to its end, or record it --unfinished"
            raise InputError(f"{folder} is at step {last:,} of {end:,}: {remedy}")
        target = results / folder.resolve().name
        held = read_run(target)[0] if target.exists() else {}
        for name in sorted((held.keys() & args.keys()) - {"run_root", "resume", "source"}):
            if held[name] != args[name]:
                change = f"{name} {held[name]}, not {args[name]}"
                raise InputError(f"{target} holds a run with {change}: remove it to replace it")
        runs[target] = folder, args | origin(args["script"], args.get("source", "")), scalars
    for target, (folder, args, scalars) in runs.items():
        target.mkdir(parents=True, exist_ok=True)
        (target / "args.json").write_text(json.dumps(args, indent=2) + "\n")
        shutil.copyfile(folder / "eval.csv", target / "eval.csv")
        scalars.to_csv(target / "scalars.csv", index=False, float_format="%.6g")
        print(f"recorded {target}")


def report(options: Options) -> None:
    """Prints tables, writes or checks what is made of them, or records runs."""
    recording = bool(options.record)
    if options.write + options.check + recording > 1 or options.unfinished > recording:
        raise InputError("give one of --write, --check and --record; --unfinished is for the last")
    if options.record:
        return record(options.record, options.results, options.unfinished)
    data = load(options.results)
    if options.write:
        return write(options.results, data)
    if not options.check:
        return print(tables(data))
    texts = documents_of(options.results, data).items()
    found = [path for path, text in texts if not path.exists() or path.read_text() != text]
    print(*(f"{path} is out of date: give --write\n" for path in found), sep="", end="")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    run_tool(report, Options, __doc__)
