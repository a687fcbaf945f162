"""Tables and figures of recorded runs beside published ones; the generated parts of README.md.

    python benchmarks/report.py            prints the tables of benchmarks/results
    python benchmarks/report.py --write    renews the READMEs' generated parts and the figures
    python benchmarks/report.py --check    names READMEs out of date (exit code 1)
    python benchmarks/report.py --record runs/dmc-walker-run__mbpo__*
    python benchmarks/report.py --results runs --write    writes runs/report.md and runs/figures/

A recorded run is a folder <env id>__<experiment>__<seed>/ with args.json, eval.csv, scalars.csv (or
TensorBoard events) and a checkpoint.pt of the actor alone. It bears its version if its script has
another one today. Intervals: the middle 95 % of 10,000 bootstrap samples, which draw seeds with
replacement (Agarwal et al. 2021, arXiv 2108.13264). One seed gives none: [-].
"""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import diffs
import matplotlib
import numpy as np
import pandas as pd
import torch
from common import RESULTS, ROOT, InputError, markdown, read_policy, run_tool
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # figures without a display
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was resumed
FIRST = {"dmc/walker-run": 30_000, "dmc/quadruped-walk": 30_000}  # on the README's first screen
SUMMARY = {  # columns of the README's table, and the experiments that may stand there
    "SAC": ("sac_utd10", "sac_utd20"),
    "MBPO": ("mbpo",),
    "FTFL": ("mbpo_ftfl",),
    "ablation": ("mbpo_residual_ablation",),
}
TRAINING = {  # tags in the figure of training: what they show, and the scale of the axis
    "eval/critic_bias": ("critic bias", "symlog"),
    "model/new_reward_error": ("error of new rewards / variance", "log"),
    "model/new_change_error": ("error of new s' / variance of s' - s", "log"),
}


@dataclass
class Options:
    write: bool = False  # renew the document and the figures
    check: bool = False  # name documents that are out of date
    record: tuple[Path, ...] = ()  # run folders to copy into the folder of results
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
        args.setdefault("version", 1)  # those before did not say
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


def version_of(name: str) -> int | None:
    """The VERSION today of a script of this name, or of the one it is patched from, if there is."""
    file = ROOT / f"{diffs.origin(name) or Path(name).stem}.py"
    found = re.search(r"^VERSION = (\d+)", file.read_text(), re.M) if file.exists() else None
    return int(found[1]) if found else None


def load(results: Path) -> pd.DataFrame:
    """Every run under a folder, long: task, run (its title), length, seed, step, tag, value."""
    frames = []
    for file in sorted(results.glob("*__*__*/eval.csv")):
        args, evaluations, scalars = read_run(file.parent)
        returns = evaluations[["step"]].assign(tag="return", value=evaluations["mean"])
        updates, version = args["updates_per_step"], args["version"]
        title = f"{args['exp_name']}, {updates} update{'s' * (updates > 1)} per step"
        title += f" (version {version})" * (version != version_of(args["script"]))
        names = {"task": args["env_id"], "run": title, "seed": args["seed"]}
        names["length"] = evaluations.step.max()
        frames.append(pd.concat([returns, scalars]).assign(**names))
    if not frames:
        raise InputError(f"{results} holds no runs, <env id>__<experiment>__<seed>/eval.csv")
    return pd.concat(frames, ignore_index=True)


def record(folders: tuple[Path, ...], results: Path) -> None:
    """Copies runs into a folder of results; all are read before any is written."""
    runs = {}
    for folder in (x for x in folders if x.name != "figures" and not x.is_file()):  # logs, reports
        args, *_ = read_run(folder)
        if (scalars := read_events(folder)).empty:
            raise InputError(f"{folder} holds no TensorBoard events: name a run's own folder")
        target, saved = results / folder.resolve().name, (folder / "checkpoint.pt").exists()
        held = read_run(target)[0] if target.exists() else {}
        for name in sorted((held.keys() & args.keys()) - {"run_root", "resume"}):
            if held[name] != args[name]:
                change = f"{name} {held[name]}, not {args[name]}"
                raise InputError(f"{target} holds a run with {change}: remove it to replace it")
        runs[target] = folder, args, scalars, read_policy(folder) if saved else None
    for target, (folder, args, scalars, policy) in runs.items():
        target.mkdir(parents=True, exist_ok=True)
        (target / "args.json").write_text(json.dumps(args, indent=2) + "\n")
        shutil.copyfile(folder / "eval.csv", target / "eval.csv")
        scalars.to_csv(target / "scalars.csv", index=False, float_format="%.6g")
        if policy:
            torch.save(policy, target / "checkpoint.pt")
        print(f"recorded {target}")


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
    means = np.random.default_rng(0).choice(scores, (10_000, len(scores))).mean(1)
    return tuple(np.percentile(means, [2.5, 97.5])) if len(scores) > 1 else (math.nan, math.nan)


def show(x: float) -> str:
    """A number in a table or a sentence."""
    return f"{x:.0e}" if abs(x) >= 1e5 else f"{x:,.0f}" if abs(x) >= 10 else f"{x:.2g}"


def cell(curves: pd.DataFrame, step: int) -> str:
    """The mean at a step, its interval, and of how many seeds if not all are there yet."""
    scores = curves.reindex([step]).loc[step].dropna()
    if scores.empty:
        return ""
    mean, low, high = map(show, (scores.mean(), *interval(scores.to_numpy())))
    some = f" ({len(scores)} of {curves.shape[1]} seeds)" if len(scores) < curves.shape[1] else ""
    return f"{mean} [{'-' if low == 'nan' else f'{low}, {high}'}]{some}"


def table(task: str, rows: pd.DataFrame, steps: list[int]) -> str:
    """A Markdown table of a task: returns at these steps, also published ones."""
    lines, tags = [], ("return", "model/updates")
    returns, updates = (curves_of(rows[rows.tag == tag]) for tag in tags)
    for title, curves in returns.items():
        line = {"run": title, "seeds": curves.shape[1]}
        line |= {f"return at {step:,}": cell(curves, step) for step in steps}
        last = max([step for step in steps if step <= curves.index.max()], default=0)
        if fits := updates.get(title, curves[:0]).loc[:last].sum().mean():
            line["model's gradient steps"] = f"{fits:,.0f}"
        lines.append(line)
    for (algorithm, source, seeds), points in published(task):
        at = {f"return at {x.step:,}": f"{x.mean} ± {x.std}" for x in points.itertuples()}
        if known := {name: x.removesuffix(" ± nan") for name, x in at.items() if name in lines[0]}:
            lines.append({"run": f"{algorithm} ({source})", "seeds": seeds} | known)
    return markdown(pd.DataFrame(lines).fillna("").rename(columns={"run": task}))


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
    """What the README begins with: runs of FIRST that have several seeds at its step."""
    there = data.seed.where((data.tag == "return") & (data.step == data.task.map(FIRST)))
    return data[there.groupby([data.task, data.run]).transform("nunique") > 1]


def summary(data: pd.DataFrame) -> str:
    """A row per task with both MBPO and FTFL: returns where the shortest of these runs end."""
    lines, returns = [], data[data.tag == "return"]
    for task, rows in returns.groupby("task", sort=False):
        rows = rows.assign(name=rows.run.str.split(",").str[0])
        rows = rows[rows.name.isin(sum(SUMMARY.values(), ()))]
        if not {"mbpo", "mbpo_ftfl"} <= {*rows.name}:
            continue
        step = rows.groupby("run").length.max().min()
        found = {run.split(",")[0]: curves for run, curves in curves_of(rows).items()}
        seeds = max(curves.shape[1] for curves in found.values())
        line = {"task": task, "steps": f"{step:,}", "seeds": seeds}
        for column, names in SUMMARY.items():
            known = [found[name] for name in names if name in found]
            line[column] = cell(known[0], step) if known else ""
        lines.append(line)
    return markdown(pd.DataFrame(lines))


def scores(data: pd.DataFrame, task: str, experiment: str, step: str, tag: str = "return"):
    """The values of a tag at a step, by seed; InputError if there are none."""
    rows = data[(data.task == task) & data.run.str.startswith(f"{experiment},") & (data.tag == tag)]
    values = curves_of(rows[rows.step == int(step)])
    if not values:
        raise InputError(f"no recorded run of {experiment} on {task} has {tag} at step {step}")
    return values[min(values)].loc[int(step)]  # of today's version, if there is one


def course(data: pd.DataFrame, task: str, experiment: str) -> str:
    """The mean returns of a run's evaluations, one after the other."""
    rows = data[(data.task == task) & data.run.str.startswith(f"{experiment},")]
    returns = rows[rows.tag == "return"].groupby("step").value.mean()
    return ", ".join(map(show, returns)) or "not recorded yet"


def draw(data: pd.DataFrame, tags: dict[str, tuple], wide: int) -> plt.Figure:
    """A panel per task and tag: per run the mean of its seeds and its interval; published means."""
    panels = [*data[data.tag.isin(tags)].groupby(["task", "tag"], sort=False)]
    wide = min(wide, len(panels))
    high = math.ceil(len(panels) / wide)
    how = {"figsize": (4.5 * wide + 4, 3.8 * high), "layout": "constrained"}
    figure, axes = plt.subplots(high, wide, squeeze=False, **how)
    looks, shown = {run: plt.cm.tab20(i % 20) for i, run in enumerate(sorted({*data.run}))}, {}
    for axis, ((task, tag), rows) in zip(axes.flat, panels, strict=False):
        for run, curves in curves_of(rows).items():
            band = [interval(values[~np.isnan(values)]) for values in curves.to_numpy()]
            (shown[run],) = axis.plot(curves.index, curves.mean(axis=1), color=looks[run])
            axis.fill_between(curves.index, *np.transpose(band), alpha=0.15, color=looks[run])
        end = 1.04 * rows.step.max()
        for (algorithm, source, seeds), points in published(task, end if tag == "return" else -1):
            curve, name = (points.step, points["mean"], points["std"]), f"{algorithm}\n({source})"
            style = {"fmt": "osD^v"[points.place.iloc[0] % 5], "markersize": 4, "capsize": 3}
            if pd.isna(seeds):  # a level, of no runs
                shown[name] = axis.axhline(points["mean"].iloc[0], color="0.3", linestyle=":")
            else:
                shown[name] = axis.errorbar(*curve, color="0.3", **style)
        axis.set(title=f"{task}\n{tags[tag][0]}", yscale=tags[tag][1], xlim=(None, end))
        axis.set(xlabel="environment step")
        axis.locator_params(axis="x", nbins=5)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.legend(shown.values(), shown.keys(), loc="outside right", fontsize="small")
    return figure


def figures_of(data: pd.DataFrame) -> dict:
    """What is drawn, {name: what draw is given}; of a task, runs of several seeds if any are so."""
    seeds = data.groupby(["task", "run"]).seed.transform("nunique")
    several = data[seeds >= seeds.groupby(data.task).transform("max").clip(upper=2)]
    returns = {"return": ("mean return", "linear")}
    figures = {"curves": (several, returns, 3), "first": (first_screen(data), returns, 3)}
    figures |= {"training": (several, TRAINING, 3)}
    return {name: x for name, x in figures.items() if x[0].tag.isin(x[1]).any()}


def diff_text(_) -> str:
    """`diff mbpo.py mbpo_ftfl.py` without the hunks of the docstrings at the top."""
    command = ["diff", "mbpo.py", "mbpo_ftfl.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    hunks = re.split(r"^(?=\d)", lines, flags=re.M)
    top = (ROOT / "mbpo.py").read_text().split("\nimport")[0].count("\n")
    shown = [hunk for hunk in hunks if hunk and int(re.match(r"\d+", hunk)[0]) > top]
    return f"```diff\n{''.join(shown)}```"


PARTS = {  # what may stand between markers: functions of the data, and of the marker's other words
    "summary": summary,
    "results": tables,
    "diff": diff_text,
    "diffs": lambda _: diffs.table(),
    # in sentences, <!-- mean TASK EXPERIMENT STEP -->, with a tag of scalars.csv if not of returns:
    "mean": lambda *words: show(scores(*words).mean()),
    "cell": lambda *words: cell(scores(*words).to_frame(0).T, 0),
    "seeds": lambda *words: ", ".join(map(show, scores(*words))),
    "course": course,
}


def filled(text: str, data: pd.DataFrame) -> str:
    """A README with what stands between <!-- name words --> and <!-- /name --> made anew.

    A name that is not in PARTS is that of a file in benchmarks/results/, which another tool wrote.
    """

    def part(found: re.Match) -> str:
        begin, name, words, old, end = found.groups()
        file = ROOT / "benchmarks" / "results" / f"{name}.md"
        new = file.read_text().strip() if file.exists() else "Not measured yet."
        new = PARTS[name](data, *words.split()) if name in PARTS else new
        line = "\n" * old.startswith("\n")  # or it is a part of a sentence
        return f"{begin}{line}{new}{line}{end}"

    return re.sub(r"(<!-- ([^\s/]\S*)([^>]*) -->)(.*?)(<!-- /\2 -->)", part, text, flags=re.S)


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
    drawn = figures_of(data)
    for name in ("curves", "first", "training"):
        file = results / "figures" / f"{name}.png"
        file.unlink(missing_ok=True)
        if name in drawn:
            draw(*drawn[name]).savefig(file, metadata={"Software": None})


def report(options: Options) -> None:
    """Prints tables, writes or checks what is made of them, or records runs."""
    if options.write + options.check + bool(options.record) > 1:
        raise InputError("give one of --write, --check and --record")
    if options.record:
        return record(options.record, options.results)
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
