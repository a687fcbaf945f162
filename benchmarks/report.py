"""Tables and figures of recorded runs beside published ones; the generated parts of README.md.

    python benchmarks/report.py                           prints the tables of benchmarks/results
    python benchmarks/report.py --write                   renews the README's parts and the figures
    python benchmarks/report.py --check                   names what is out of date (exit code 1)
    python benchmarks/report.py --record runs/dmc-walker-run__mbpo__*
    python benchmarks/report.py --results runs            prints the tables of the runs in runs/
    python benchmarks/report.py --results runs --write    writes runs/report.md and runs/figures/

A recorded run is a folder <env id>__<experiment>__<seed>/ with args.json, eval.csv and scalars.csv;
a run's own folder, with TensorBoard events instead of scalars.csv, will do as well. Published
figures stand, with their source, in benchmarks/published.csv.

Intervals: the middle 95 % of 10,000 bootstrap samples, which draw seeds with replacement (Agarwal
et al. 2021, arXiv 2108.13264). One seed gives none: [-].
"""

import ast
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import RESULTS, ROOT, InputError, markdown, run_tool
from PIL import Image
from scipy.stats import bootstrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # figures without a display
GOALS = {"dmc/walker-run": 50, "Hopper-v5": 500}  # returns to reach, within the first curves
PAIR = "mbpo_ftfl", "sac_utd10"  # experiments whose returns are compared seed by seed
FIRST = "dmc/walker-run", "dmc/quadruped-walk"  # tasks on the README's first screen
OTHER_CODE = "† Some of these runs were made by other code than that of today's script."
TRAINING = {  # tags in the figure of training: what they show, and the scale of the axis
    "eval/critic_bias": ("critic bias", "symlog"),
    "model/reward_error": ("reward error / variance", "log"),
    "model/reward_std_ratio": ("reward spread, predicted / real", "log"),
    "model/change_error_mean": ("state error / variance of s' - s", "log"),
}


@dataclass
class Options:
    write: bool = False  # renew the document and the figures
    check: bool = False  # name what is out of date
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


@cache
def origin(script: str, source: str) -> dict:
    """Code and commit of the version of a script with this SHA-256; the commit may yet be None."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True)
    log = git(["git", "rev-list", "--all", "--", script]).stdout if shutil.which("git") else b""
    made = [(x, git(["git", "show", f"{x}:./{script}"]).stdout) for x in log.decode().split()]
    for commit, text in [*made, *((None, path.read_bytes()) for path in ROOT.glob(script))]:
        if hashlib.sha256(text).hexdigest() == source:
            return {"code": code_of(text.decode()), "commit": commit}
    return {}


def mark(args: dict) -> str:
    """The sign of a run that was made by other code than that of today's script."""
    made = args if "code" in args else origin(args["script"], args.get("source", ""))
    today = [code_of(path.read_text()) for path in ROOT.glob(args["script"])]
    return "" if made.get("code") in today else " †"


def load(results: Path) -> pd.DataFrame:
    """Every run under a folder, long: task, run (its title), length, seed, step, tag, value."""
    frames = []
    for file in sorted(results.glob("*__*__*/eval.csv")):
        args, evaluations, scalars = read_run(file.parent)
        returns = evaluations[["step"]].assign(tag="return", value=evaluations["mean"])
        frame = pd.concat([returns, scalars[scalars.tag.isin(TRAINING)]])
        updates = args["updates_per_step"]
        title = f"{args['exp_name']}, {updates} update{'s' * (updates > 1)} per step"
        names = {"task": args["env_id"], "run": title, "seed": args["seed"], "mark": mark(args)}
        frames.append(frame.assign(**names, length=args["total_timesteps"]))
    if not frames:
        raise InputError(f"{results} holds no runs, <env id>__<experiment>__<seed>/eval.csv")
    data = pd.concat(frames, ignore_index=True)
    data["run"] += data.groupby(["task", "run"]).mark.transform("max")  # one seed marks them all
    return data.drop(columns="mark")


def curves_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By run, the values of one tag on one task: a row per step, a column per seed, or NaN."""
    shape = {"index": "step", "columns": "seed", "values": "value", "aggfunc": "last"}
    return {title: run.pivot_table(**shape) for title, run in rows.groupby("run")}


def published(task: str) -> pd.core.groupby.DataFrameGroupBy:
    """What others report on a task, by algorithm; a Gymnasium task is quoted without version."""
    figures = pd.read_csv(ROOT / "benchmarks" / "published.csv")
    figures = figures[figures.task.isin([task, task.split("-v")[0]])]
    return figures.groupby(["algorithm", "source", "seeds"], sort=False)


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
    low, high = interval(scores.to_numpy())
    between = "-" if np.isnan(low) else f"{low:.0f}, {high:.0f}"
    some = f" ({len(scores)} of {curves.shape[1]} seeds)" if len(scores) < curves.shape[1] else ""
    return f"{scores.mean():.0f} [{between}]{some}"


def steps_to_reach(curves: pd.DataFrame, goal: float) -> str:
    """Median over seeds of the first evaluated step with a return of at least the goal.

    A seed that never gets there counts as infinity, and is told.
    """
    first = (curves >= goal).idxmax().where((curves >= goal).any(), math.inf)
    there, median = np.isfinite(first).sum(), first.median()
    some = f"{there} of {len(first)} seeds"
    if not math.isfinite(median):
        return f"reached by {some}" if there else "not reached"
    return f"{median:,.0f}" + (f" ({some})" if there < len(first) else "")


def paired(curves: dict[str, pd.DataFrame]) -> list[str]:
    """How far PAIR's first run is ahead of its second, by seed, at the last step of both."""
    lines, (one, other) = [], PAIR
    curves = {title.removesuffix(" †"): run for title, run in curves.items()}
    for title in curves:
        rival = title.replace(f"{one},", f"{other},")
        if rival != title and rival in curves:
            ahead = (curves[title] - curves[rival]).dropna(axis=1, how="all").dropna()
            said = f"{one} less {other}{title.removeprefix(one)}, by seed, at step"
            for step in ahead.index[-1:]:
                lines.append(f"\n{said} {step:,}: {cell(ahead, step)}, {ahead.shape[1]} seeds.")
    return lines


def table(task: str, rows: pd.DataFrame) -> str:
    """A Markdown table of the returns on a task, then published ones, and what is paired.

    Its columns are the evaluated steps next to half and all of the length of each run.
    """
    returns, biases = (rows[rows.tag == tag] for tag in ("return", "eval/critic_bias"))
    curves_by_run, biases, lines = curves_of(returns), curves_of(biases), []
    marks = [mark for length in returns.length.unique() for mark in (length / 2, length)]
    steps = sorted({min(returns.step, key=lambda step: abs(step - mark)) for mark in marks})
    for title, curves in curves_by_run.items():
        line = {"run": title, "seeds": curves.shape[1]}
        line |= {f"{step:,}": cell(curves, step) for step in steps}
        bias = biases.get(title, curves[:0])
        line["critic bias at its end"] = cell(bias, bias.dropna().index.max())
        if goal := GOALS.get(task):
            line[f"steps to {goal:,}"] = steps_to_reach(curves, goal)
        lines.append(line)
    for (algorithm, source, seeds), points in published(task):
        line = {"run": f"{algorithm} ({source})", "seeds": seeds}
        at = {f"{x.step:,}": f"{x.mean} ± {x.std}" for x in points.itertuples()}
        lines.append(line | {name: text for name, text in at.items() if name in lines[0]})
    made = markdown(pd.DataFrame(lines).fillna(""))
    return "\n".join([f"**{task}**\n", made, *paired(curves_by_run)])


def tables(data: pd.DataFrame) -> str:
    """A table for every task, and what their sign of other code means."""
    made = [table(task, rows) for task, rows in data.groupby("task")]
    if data.run.str.endswith("†").any():
        made.append(OTHER_CODE)
    return "\n\n".join(made)


def summary(data: pd.DataFrame, link: str) -> str:
    """The README's first screen: FIRST's curves, and a short table of returns at PAIR's end."""
    first = data[data.task.isin(FIRST)]
    made = [f"![Mean return by environment step]({link}/first.png)"]
    for task, rows in first.groupby("task"):
        ends = rows[(rows.tag == "return") & rows.run.str.startswith(PAIR)]
        step = ends.groupby("run").step.max().min()
        returns, biases = (curves_of(rows[rows.tag == x]) for x in ("return", "eval/critic_bias"))
        lines = []
        for title, curves in returns.items():
            if step in curves.index:
                known = biases.get(title, curves[:0])
                line = {f"{task} at step {step:,}": title, "seeds": curves.shape[1]}
                line["mean return [95 % interval]"] = cell(curves, step)
                lines.append(
                    line | {"critic bias": cell(known, step) if step in known.index else ""}
                )
        made += [markdown(pd.DataFrame(lines)), *(line.strip() for line in paired(returns))]
    if first.run.str.endswith("†").any():
        made.append(OTHER_CODE)
    return "\n\n".join(made)


def draw_curves(returns: pd.DataFrame) -> sns.FacetGrid:
    """Return by environment step: a panel per task, a band of its interval, published points."""
    grid = relplot(returns, col="task", col_wrap=min(3, returns.task.nunique()), height=4.2)
    for task, axis in grid.axes_dict.items():
        for i, ((algorithm, source, _), points) in enumerate(published(task)):
            style = {"fmt": "osD^v"[i % 5], "color": f"{0.4 * (i % 3)}", "markersize": 4}
            style |= {"linewidth": 1, "capsize": 3, "label": f"{algorithm}\n({source})"}
            axis.errorbar(points.step, points["mean"], points["std"], **style)
        axis.set(title=task, ylabel="mean return", xlabel="environment step")
        axis.legend(handles=axis.containers, fontsize=7, frameon=False)
        axis.locator_params(axis="x", nbins=5)
    return grid


def draw_training(scalars: pd.DataFrame) -> sns.FacetGrid:
    """What TRAINING names by environment step, one row of panels per task."""
    tags = [tag for tag in TRAINING if tag in {*scalars.tag}]
    grid = relplot(scalars, row="task", col="tag", col_order=tags, height=3)
    for (task, tag), axis in grid.axes_dict.items():
        axis.set(title=TRAINING[tag][0], yscale=TRAINING[tag][1], ylabel=task, xlabel="step")
    return grid


def relplot(rows: pd.DataFrame, **layout) -> sns.FacetGrid:
    """Per run the mean of its seeds, and a band, the 95 % bootstrap interval of that mean."""
    free = {"sharex": False, "sharey": False}
    lines = {"x": "step", "y": "value", "hue": "run", "style": "run", "dashes": False}
    lines |= {"kind": "line", "errorbar": ("ci", 95), "seed": 0}
    return sns.relplot(rows, **lines, facet_kws=free, **layout)


def figures_of(data: pd.DataFrame) -> dict:
    """What is drawn, {name: (function, rows)}; of training, the tasks with runs to compare."""
    scalars = data[data.tag != "return"]
    scalars = scalars.groupby("task").filter(lambda rows: rows.run.nunique() > 1)
    returns = data[data.tag == "return"]
    figures = {"curves": (draw_curves, returns)}
    if returns.task.isin(FIRST).any():
        figures["first"] = draw_curves, returns[returns.task.isin(FIRST)]
    return figures | ({"training": (draw_training, scalars)} if len(scalars) else {})


def digest(rows: pd.DataFrame) -> str:
    """SHA-256 of all that a figure is made of: its rows, the published figures, this code."""
    text = rows.to_csv(index=False, float_format="%.6g") + code_of(Path(__file__).read_text())
    text += (ROOT / "benchmarks" / "published.csv").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a figure holds, or None where there is no such figure."""
    try:
        with Image.open(path) as image:
            return image.info.get("Description")
    except OSError:  # absent, or no image
        return None


def timing_text() -> str:
    """What the README's commands take, as far as benchmarks/time_readme.py measured it."""
    file, said = RESULTS / "readme_commands.json", []
    took = json.loads(file.read_text()) if file.exists() else {}
    minutes = {name: f"{value / 60:.0f} minutes" for name, value in took.items() if "_s" in name}
    if "first_fit_seconds" in took:
        said.append(
            f"The first command installs in {minutes['install_seconds']}, prints a return of "
            f"{took['untrained_return']:.0f} for the untrained policy, and reaches step 10,000, "
            f"after the first fit, in {minutes['first_fit_seconds']}; all 500,000 steps are a job "
            "for a GPU, or for days."
        )
    if "test_seconds" in took:
        said.append(
            f"The second runs {took['tests_passed']} tests in {minutes['test_seconds']}; in them "
            "each script must learn a real task."
        )
    if "learn_seconds" in took:
        said.append(
            f"In the third, of {minutes['learn_seconds']}, the return rises from "
            f"{took['learn_first']:.0f} to {took['learn_best']:.0f}; 1,000 is a pole that never "
            "falls."
        )
    if not said:
        return "Not timed yet: `python benchmarks/time_readme.py`."
    return textwrap.fill(f"On {took['cores']} CPU cores: {' '.join(said)}", 118)


def included(name: str) -> str:
    """The text of a file that another tool wrote into benchmarks/results/."""
    path = ROOT / "benchmarks" / "results" / name
    return path.read_text().strip() if path.exists() else "Not measured yet."


def cost_text() -> str:
    """Hours of a run of 500,000 steps, from the steps per second that throughput.py measured."""
    path = ROOT / "benchmarks" / "results" / "throughput" / "cpu.csv"
    if not path.exists():
        return "Not measured yet."
    rows = pd.read_csv(path).query("kind == 'steps' and who == 'ours' and rate > 0")
    rates = rows.groupby("task", sort=False).rate.median()
    names, hours = "`" + rates.index + "`", (500_000 / rates.array / 3600).round().astype(int)
    columns = {"script": names, "steps per second": rates.array, "hours for 500,000 steps": hours}
    return markdown(pd.DataFrame(columns))


def diff_text() -> str:
    """`diff mbpo.py mbpo_ftfl.py` without the hunks of the docstrings at the top."""
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    lines = subprocess.run(["diff", "mbpo.py", "mbpo_ftfl.py"], **options).stdout
    hunks = re.split(r"^(?=\d)", lines, flags=re.M)
    top = (ROOT / "mbpo.py").read_text().split("\nimport")[0].count("\n")
    shown = [hunk for hunk in hunks if hunk and int(re.match(r"\d+", hunk)[0]) > top]
    return f"```diff\n{''.join(shown)}```"


def parts_of(data: pd.DataFrame, link: str) -> dict[str, str]:
    """What the runs say, by the name in its markers; figures are under `link`."""
    parts = {"training": ""}
    parts["results"] = f"""\
![Mean return by environment step, one panel per task]({link}/curves.png)

Mean return at an environment step, and mean critic bias (see "What TensorBoard shows"), with
[95 % bootstrap interval over seeds; - for one seed]. Steps to a return: the first evaluation that
reaches it, median over seeds. Published: mean ± standard deviation over seeds. In the figure, lines
are means over seeds, bands their intervals, and points are published.

{tables(data)}"""
    if "training" in figures_of(data):
        parts["training"] = f"""\
![Critic bias and model fit by environment step]({link}/training.png)

Along training (see "What TensorBoard shows"), on tasks with several scripts:
{", ".join(f"`{tag}`" for tag in TRAINING)}."""
    return parts


def documents_of(results: Path, data: pd.DataFrame) -> dict[Path, str]:
    """The documents on a folder of runs, and the text that each should have.

    For our own results these are the two READMEs, new between their markers; else report.md there.
    """
    if results.resolve() != ROOT / "benchmarks" / "results":
        parts = parts_of(data, "figures")
        return {results / "report.md": f"{parts['results']}\n\n{parts['training']}\n"}
    speed = {"throughput": "cpu", "throughput-gpu": "cuda", "variants": "variants_cpu"}
    speed |= {"many-seeds": "many_seeds_cpu"}
    speed = {name: included(f"throughput/{file}.md") for name, file in speed.items()}
    texts, fits = {}, {"mechanism": included("mechanism/summary.md"), "cost": cost_text()}
    first = {"summary": summary(data, "benchmarks/results/figures"), "diff": diff_text()}
    first |= {"timing": timing_text(), "needed": included("updates_needed/summary.md")}
    for path, parts in {
        ROOT / "README.md": first,
        ROOT / "benchmarks" / "README.md": parts_of(data, "results/figures") | speed | fits,
    }.items():
        texts[path] = path.read_text()
        for name, part in parts.items():
            block = f"<!-- {name} -->\n{part}\n<!-- /{name} -->"
            pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
            swap = partial(re.subn, pattern, lambda _, block=block: block, flags=re.S)
            texts[path], count = swap(texts[path])
            if count != 1:
                needed = f"the markers <!-- {name} --> and <!-- /{name} --> once"
                raise InputError(f"{path} needs {needed}")
    return texts


def renew(results: Path, write: bool) -> list[Path]:
    """What is out of date among the documents and figures of a folder; written anew if asked."""
    data = load(results)
    stale = []
    for path, text in documents_of(results, data).items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if write:
                path.write_text(text)
    for name, (draw, rows) in figures_of(data).items():
        path, description = results / "figures" / f"{name}.png", digest(rows)
        if drawn_from(path) != description:
            stale.append(path)
            if write:
                path.parent.mkdir(exist_ok=True)
                metadata = {"Description": description, "Software": None}
                draw(rows).savefig(path, dpi=100, metadata=metadata)
    return stale


def record(folders: tuple[Path, ...], results: Path) -> None:
    """Copies finished runs into a folder of results; all are read before any is written."""
    runs = {}
    for folder in folders:
        args, evaluations, _ = read_run(folder)
        last, end = evaluations.step.max(), args["total_timesteps"]
        if (scalars := read_events(folder)).empty:
            raise InputError(f"{folder} holds no TensorBoard events: name a run's own folder")
        if last + args["eval_frequency"] <= end:
            raise InputError(f"{folder} is at step {last:,} of {end:,}: --resume it to its end")
        target = results / folder.resolve().name
        if target.exists():
            held, free = read_run(target)[0], {"run_root", "resume", "source"}
            for name in sorted((held.keys() & args.keys()) - free):
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
    """Prints tables, renews or checks what is made of them, or records runs."""
    if bool(options.write) + bool(options.check) + bool(options.record) > 1:
        raise InputError("give one of --write, --check and --record")
    if options.record:
        return record(options.record, options.results)
    if not options.write and not options.check:
        return print(tables(load(options.results)))
    stale = renew(options.results, options.write)
    for path in stale:
        print(f"{path} is {'renewed' if options.write else 'out of date: give --write'}")
    sys.exit(1 if options.check and stale else 0)


if __name__ == "__main__":
    run_tool(report, Options, __doc__)
