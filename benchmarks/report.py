"""Tables and figures of recorded runs beside published ones; the generated parts of README.md.

    python benchmarks/report.py            prints the tables of benchmarks/results
    python benchmarks/report.py --write    renews the READMEs' generated parts and the figures
    python benchmarks/report.py --check    names READMEs out of date (exit code 1)
    python benchmarks/report.py --record runs/dmc-walker-run__mbpo__*
    python benchmarks/report.py --results runs --write    writes runs/report.md and runs/curves.png

A recorded run is a folder <env id>__<experiment>__<seed>/ with args.json, eval.csv, scalars.csv (or
TensorBoard events) and a checkpoint.pt of the actor alone. A run that goes on is recorded as far as
it has got. It bears its version if its script has another one today. In tables and figures stand
the mean over seeds and [the least, the largest].
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
import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, ROOT, InputError, markdown, read_policy, run_tool
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # figures without a display
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was resumed
KINDS = {  # columns of the README's table, lines of its figure: experiments, and targets of a fit
    "SAC": ("sac_utd10", "sac_utd20", "sac"),
    "MBPO": ("mbpo", "raw s' - s"),
    "FTFL": ("mbpo_ftfl", "unit s'"),
    "ablation": ("mbpo_residual_ablation", "unit s' - s"),
    "FTFL, ridge": ("mbpo_ftfl_ridge", "mbpo_ftfl_ridge_beta", "ridge"),
    "raw s'": ("raw_direct",),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
COLORS = dict(zip(KINDS, plt.cm.tab10.colors, strict=False))
COLUMNS = [*KINDS][:4]  # of the README's table
LENGTH = "dmc/humanoid-stand", "dmc/walker-run"  # tasks in the README's figure
UNITS_TASK, UNIT = "dmc/cartpole-swingup", "_unit0.001"  # where the model's reward has other units


@dataclass
class Options:
    write: bool = False  # renew the document and the figures
    check: bool = False  # name documents that are out of date
    record: tuple[Path, ...] = ()  # run folders to copy into the folder of results
    results: Path = RESULTS  # folder of runs


# --- Runs -----------------------------------------------------------------------------------------
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
    """Every run under a folder: task, run (its title), exp_name, length, seed, step, tag, value."""
    frames = []
    for file in sorted(results.glob("*__*__*/eval.csv")):
        args, evaluations, scalars = read_run(file.parent)
        returns = evaluations[["step"]].assign(tag="return", value=evaluations["mean"])
        updates, version = args["updates_per_step"], args["version"]
        title = f"{args['exp_name']}, {updates} update{'s' * (updates > 1)} per step"
        title += f" (version {version})" * (version != version_of(args["script"]))
        names = {"task": args["env_id"], "run": title, "exp_name": args["exp_name"]}
        names |= {"seed": args["seed"], "length": evaluations.step.max()}
        frames.append(pd.concat([returns, scalars]).assign(**names))
    if not frames:
        raise InputError(f"{results} holds no runs, <env id>__<experiment>__<seed>/eval.csv")
    return pd.concat(frames, ignore_index=True)


def record(folders: tuple[Path, ...], results: Path) -> None:
    """Copies runs into a folder of results; all are read before any is written."""
    runs = {}
    for folder in (x for x in folders if not x.is_file()):  # logs, reports
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


def published(task: str, end: float = math.inf) -> pd.core.groupby.DataFrameGroupBy:
    """What others report of a task until step `end`; Gymnasium's is quoted without version."""
    figures = pd.read_csv(ROOT / "benchmarks" / "published.csv", dtype={"seeds": "Int64"})
    figures["place"] = pd.factorize(figures.algorithm)[0]
    figures = figures[figures.task.isin([task, task.split("-v")[0]]) & (figures.step <= end)]
    return figures.groupby(["algorithm", "source", "seeds"], sort=False, dropna=False)


# --- Tables ---------------------------------------------------------------------------------------
def show(x: float) -> str:
    """A number in a table or a sentence."""
    return f"{x:.0e}" if abs(x) >= 1e5 else f"{x:,.0f}" if abs(x) >= 10 else f"{x:.2g}"


def cell(values: pd.Series) -> str:
    """The mean over seeds and [the least, the largest], if there are several."""
    ends = f" [{show(values.min())}, {show(values.max())}]" * (len(values) > 1)
    return show(values.mean()) + ends if len(values) else ""


def table(data: pd.DataFrame) -> str:
    """A Markdown table of all runs: returns where they end."""
    lines = []
    for (task, run), rows in data[data.tag == "return"].groupby(["task", "run"], sort=False):
        line = {"task": task, "run": run, "seeds": rows.seed.nunique(), "steps": rows.length.min()}
        lines.append(line | {"return": cell(rows.value[rows.step == line["steps"]])})
    return markdown(pd.DataFrame(lines))


def summary(data: pd.DataFrame) -> str:
    """A row per task with both MBPO and FTFL: returns where the shortest of these runs end."""
    lines, returns = [], data[data.tag == "return"]
    for task, suffix in [*((task, "") for task in returns.task.unique()), (UNITS_TASK, UNIT)]:
        names = {name + suffix * (kind != "SAC"): kind for name, kind in KIND_OF.items()}
        rows = returns[returns.task == task].assign(kind=returns.exp_name.map(names))
        rows = rows[rows.kind.isin(COLUMNS)]
        if not {"MBPO", "FTFL"} <= {*rows.kind}:
            continue
        step = rows.groupby("kind").length.max().min()
        line = {"task": task + suffix.replace("_unit", ", the model's reward times ")}
        line |= {"steps": f"{step:,}", "seeds": rows.groupby("kind").seed.nunique().max()}
        rows = rows[rows.step == step]
        lines.append(line | {kind: cell(rows.value[rows.kind == kind]) for kind in COLUMNS})
    return markdown(pd.DataFrame(lines))


def mean(data: pd.DataFrame, task: str, name: str, step: str, tag: str = "return") -> str:
    """A tag at a step of an experiment's runs, in a sentence; InputError if there is none."""
    rows = data[(data.task == task) & (data.exp_name == name) & (data.tag == tag)]
    if (rows := rows[rows.step == int(step)]).empty:
        raise InputError(f"no recorded run of {name} on {task} has {tag} at step {step}")
    return cell(rows.value)


def course(data: pd.DataFrame, task: str, name: str) -> str:
    """The mean returns of a run's evaluations, one after the other."""
    rows = data[(data.task == task) & (data.exp_name == name) & (data.tag == "return")]
    return ", ".join(map(show, rows.groupby("step").value.mean())) or "not recorded yet"


# --- Figures --------------------------------------------------------------------------------------
def draw(axis: plt.Axes, points: pd.DataFrame, x: str, title: str, palette: dict) -> None:
    """A line per run or kind (column name), through means over seeds, in their range."""
    how = {"errorbar": ("pi", 100), "palette": palette, "marker": "o", "markersize": 4}
    sns.lineplot(points, x=x, y="value", hue="name", ax=axis, **how)
    axis.set(title=title, ylabel=None)


def draw_returns(axis: plt.Axes, rows: pd.DataFrame, palette: dict) -> None:
    """The returns of one task by step, and what others have published."""
    task, rows = rows.task.iloc[0], rows[rows.tag == "return"]
    draw(axis, rows, "step", f"{task}\nmean return", palette)
    for (algorithm, source, seeds), points in published(task, rows.step.max()):
        name, marker = f"{algorithm}\n({source})", "osD^vPX"[points.place.iloc[0] % 7]
        if pd.isna(seeds):  # a level, of no runs
            axis.axhline(points["mean"].iloc[0], color="0.3", linestyle=":", label=name)
        else:
            how = {"color": "0.3", "markersize": 4, "capsize": 3, "label": name}
            axis.errorbar(points.step, points["mean"], points["std"], fmt=marker, **how)


def draw_units(axis: plt.Axes, points: pd.DataFrame, what: str) -> None:
    """Values where the model learns c r, by Var[s' - s] / Var[c r]; and where tasks stand."""
    scales = pd.read_csv(RESULTS / "mechanism/scales.csv", index_col="task").residual_over_reward
    points = points.assign(x=scales[UNITS_TASK] / points.c.astype(float) ** 2)
    draw(axis, points, "x", f"{UNITS_TASK}\n{what}", COLORS)
    axis.set(xscale="log", xlabel="variance of s' - s / variance of the model's reward")
    top = axis.secondary_xaxis("top")
    top.set_xticks(scales, scales.index.str.removeprefix("dmc/"), rotation=90, fontsize="x-small")
    top.tick_params(which="minor", top=False)


def returns_by_unit(data: pd.DataFrame) -> pd.DataFrame:
    """Each run's return at 15,000 steps: c, and the name of its kind."""
    rows = data[(data.task == UNITS_TASK) & (data.tag == "return") & (data.step == 15_000)]
    parts = rows.exp_name.str.extract(r"(?P<name>.*?)(?:_unit(?P<c>.+))?$").fillna("1")
    rows = rows.assign(name=parts.name.map(KIND_OF), c=parts.c)
    return rows[rows.name.notna() & (rows.name != "SAC")]


def errors_of(name: str, pattern: str) -> pd.DataFrame:
    """Of NAME/errors.csv the reward's error at new actions, and what the pattern finds in cells."""
    rows = pd.read_csv(RESULTS / name / "errors.csv")
    rows = rows[(rows.set == "actions") & (rows.beta == 0) & (rows.schedule == "one fit")]
    rows = rows[(rows.transitions == 5000) & (rows.data == "random")].assign(value=rows.reward)
    parts = rows.cell.str.extract(pattern)
    return rows.assign(**parts.assign(name=parts.name.map(KIND_OF))).dropna(subset=["name"])


def with_legend(figure: plt.Figure) -> plt.Figure:
    """A figure with one legend, of all its panels."""
    shown = {}
    for axis in (axis for axis in figure.axes if axis.get_legend()):
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.get_legend().remove()
    figure.legend(shown.values(), shown.keys(), loc="outside right", fontsize="small")
    return figure


def evidence(data: pd.DataFrame) -> plt.Figure:
    """The README's figure: units, the reward's error in a fit, and two tasks at length."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.2), layout="constrained")
    draw_units(axes[0], returns_by_unit(data), "return at 15,000 steps")
    errors = errors_of("mechanism", "(?P<name>.*)")
    errors = errors[errors.task == LENGTH[0]]
    draw(axes[1], errors, "updates", f"{LENGTH[0]}\nerror of r / variance of r", COLORS)
    axes[1].set(xscale="log", yscale="log", xlabel="gradient steps of a fit")
    for axis, task in zip(axes[2:], sorted({*LENGTH} & {*data.task}), strict=False):
        rows = data[data.task == task]
        draw_returns(axis, rows.assign(name=rows.exp_name.map(KIND_OF)).dropna(), COLORS)
    return with_legend(figure)


def units(data: pd.DataFrame) -> plt.Figure:
    """What the unit of the reward does to the return, and to the reward's error in a fit."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    draw_units(axes[0], returns_by_unit(data), "return at 15,000 steps")
    errors = errors_of("units", r"build/(?P<name>.*)_reward_unit .*?(?P<c>[\d.]+)$")
    errors = errors[errors.updates == errors.updates.max()]
    draw_units(axes[1], errors, "error of r / variance of r, after a fit")
    axes[1].set(yscale="log")
    return with_legend(figure)


def curves(data: pd.DataFrame) -> plt.Figure:
    """A panel per task, with all its runs."""
    panels = data.assign(name=data.run).groupby("task", sort=False)
    how = {"figsize": (18, 3.8 * math.ceil(len(panels) / 3)), "layout": "constrained"}
    figure, axes = plt.subplots(math.ceil(len(panels) / 3), 3, squeeze=False, **how)
    palette = {run: plt.cm.tab20(i % 20) for i, run in enumerate(sorted({*data.run}))}
    for axis, (_, rows) in zip(axes.flat, panels, strict=False):
        draw_returns(axis, rows, palette)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return with_legend(figure)


# --- Documents ------------------------------------------------------------------------------------
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
    "diff": diff_text,
    "diffs": lambda _: diffs.table(),
    "mean": mean,
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
    if results.resolve() != RESULTS:
        return {results / "report.md": f"![Mean returns](curves.png)\n\n{table(data)}\n"}
    readmes = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    return {path: filled(path.read_text(), data) for path in readmes}


def report(options: Options) -> None:
    """Prints tables, writes or checks what is made of them, or records runs."""
    if options.write + options.check + bool(options.record) > 1:
        raise InputError("give one of --write, --check and --record")
    if options.record:
        return record(options.record, options.results)
    data = load(options.results)
    if not options.write and not options.check:
        return print(table(data))
    texts = documents_of(options.results, data).items()
    if options.check:
        found = [path for path, text in texts if not path.exists() or path.read_text() != text]
        print(*(f"{path} is out of date: give --write\n" for path in found), sep="", end="")
        sys.exit(1 if found else 0)
    for path, text in texts:
        path.write_text(text)
    for figure in [curves] + [evidence, units] * (options.results.resolve() == RESULTS):
        figure(data).savefig(
            options.results / f"{figure.__name__}.png", metadata={"Software": None}
        )


if __name__ == "__main__":
    run_tool(report, Options, __doc__)
