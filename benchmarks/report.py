"""Tables and figures of recorded runs beside published ones; the generated parts of README.md.

    python benchmarks/report.py            prints the tables of benchmarks/results
    python benchmarks/report.py --write    renews the READMEs' generated parts and the figures
    python benchmarks/report.py --check    names READMEs out of date (exit code 1)
    python benchmarks/report.py --record runs/dmc-walker-run__mbpo__*
    python benchmarks/report.py --results runs --write    writes runs/report.md and runs/curves.png

A recorded run is a folder <env id>__<experiment>__<seed>/ with args.json, eval.csv, scalars.csv (or
TensorBoard events) and a checkpoint.pt of the actor alone, as far as the run has got. It bears its
version if its script has another one today. Shown are means over seeds and [least, largest].
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
import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, ROOT, InputError, load_script, markdown, run_tool
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

plt.switch_backend("Agg")  # figures without a display
logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every run that was resumed
KIND_OF = {  # columns of the README's table, lines of its figure: of experiments and of targets
    **dict.fromkeys(("sac_utd10", "sac_utd20", "sac"), "SAC"),
    **dict.fromkeys(("mbpo", "raw s' - s"), "MBPO"),
    **dict.fromkeys(("mbpo_ftfl", "unit s'"), "FTFL"),
    **dict.fromkeys(("mbpo_residual_ablation", "unit s' - s"), "ablation"),
    **dict.fromkeys(("mbpo_ftfl_ridge", "ridge"), "ridge"),
    **dict.fromkeys(("mbpo_ftfl_beta", "unit s', beta"), "FTFL, beta"),
    **dict.fromkeys(("mbpo_ftfl_ridge_beta", "ridge, beta"), "ridge, beta"),
    "raw_direct": "raw s'",
}
COLORS = dict(zip(dict.fromkeys(KIND_OF.values()), plt.cm.tab10.colors, strict=False))
COLUMNS = ["SAC", "MBPO", "FTFL", "ablation", "FTFL, beta"]  # of the README's table
FITTED, LEARNED = "dmc/humanoid-stand", ("dmc/finger-spin", "dmc/walker-run")  # in its figure
UNITS_TASK = "dmc/cartpole-swingup"  # where the model's reward has other units
NAME = r"(?:build/)?(?P<name>.+?)(?:(?:_reward)?_unit(?: .* )?(?P<c>[\d.]+))?$"  # also of a cell
READMES = ROOT / "README.md", ROOT / "benchmarks/README.md"


@dataclass
class Options:
    write: bool = False  # renew the document and the figures
    check: bool = False  # name documents that are out of date
    record: tuple[Path, ...] = ()  # run folders to copy into the folder of results
    results: Path = RESULTS  # folder of runs


def read_run(folder: Path) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """Settings, evaluations (step, mean, ...) and scalars (step, tag, value) of a run."""
    try:
        args = json.loads((file := folder / "args.json").read_text())
        args.setdefault("version", 1)  # those before did not say
        evaluations = pd.read_csv(file := folder / "eval.csv").astype({"step": int, "mean": float})
        if evaluations.empty:
            raise ValueError("no evaluation yet")
        if (file := folder / "scalars.csv").exists():
            scalars = pd.read_csv(file)
        else:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            tags = events.Tags()["scalars"]
            rows = [(event.step, tag, event.value) for tag in tags for event in events.Scalars(tag)]
            scalars = pd.DataFrame(sorted(rows), None, ["step", "tag", "value"])
        return args, evaluations, scalars.astype({"step": int, "tag": str, "value": float})
    except (OSError, KeyError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder} is no run that can be read: {file.name}: {reason}") from None


def load(results: Path) -> pd.DataFrame:
    """Every run under a folder: task, run (its title), exp_name, length, seed, step, tag, value."""
    frames = []
    for file in sorted(results.glob("*__*__*/eval.csv")):
        args, evaluations, scalars = read_run(file.parent)
        returns = evaluations[["step"]].assign(tag="return", value=evaluations["mean"])
        script, n = diffs.origin(args["script"]), args["updates_per_step"]
        title = f"{args['exp_name']}, {n} update{'s' * (n > 1)} per step"
        if not script or args["version"] != load_script(f"{script}.py").VERSION:
            title += f" (version {args['version']})"
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
        args, _, scalars = read_run(folder)
        target, policy = results / folder.resolve().name, None
        held = read_run(target)[0] if target.exists() else {}
        for name in sorted((held.keys() & args.keys()) - {"run_root", "resume"}):
            if held[name] != args[name]:
                change = f"{name} {held[name]}, not {args[name]}"
                raise InputError(f"{target} holds a run with {change}: remove it to replace it")
        if (folder / "checkpoint.pt").exists():
            saved = load_script("mbpo.py").read_checkpoint(folder)
            step, params = saved["progress"]["step"], saved["agent"]["actor"]["params"]
            policy = {"settings": saved["settings"], "progress": {"step": step}}
            policy["agent"] = {"actor": {"params": params}}
        runs[target] = folder, args, scalars, policy
    for target, (folder, args, scalars, policy) in runs.items():
        target.mkdir(parents=True, exist_ok=True)
        (target / "args.json").write_text(json.dumps(args, indent=2) + "\n")
        shutil.copyfile(folder / "eval.csv", target / "eval.csv")
        scalars.to_csv(target / "scalars.csv", index=False, float_format="%.6g")
        if policy:
            torch.save(policy, target / "checkpoint.pt")
        print(f"recorded {target}")


def cell(values: pd.Series) -> str:
    """The mean over seeds and [the least, the largest], if there are several."""
    numbers = [values.mean(), values.min(), values.max()]
    mean, *ends = [f"{x:,.0f}" if abs(x) >= 10 else f"{x:.2g}" for x in numbers]
    return f"{mean} [{', '.join(ends)}]" if len(values) > 1 else mean


def table(data: pd.DataFrame) -> str:
    """A Markdown table of all runs: returns where they end."""
    lines = []
    for (task, run), rows in data[data.tag == "return"].groupby(["task", "run"], sort=False):
        seeds, steps = rows.seed.nunique(), rows.length.min()
        lines.append([task, run, seeds, steps, cell(rows.value[rows.step == steps])])
    return markdown(pd.DataFrame(lines, columns=["task", "run", "seeds", "steps", "return"]))


def by_kind(rows: pd.DataFrame, column: str = "exp_name") -> pd.DataFrame:
    """The rows of a kind, by a column of names: name becomes the kind, c the unit or nan."""
    parts = rows[column].str.extract(NAME)
    return rows.assign(name=parts.name.map(KIND_OF), c=parts.c).dropna(subset="name")


def summary(data: pd.DataFrame) -> str:
    """A row per task with both MBPO and FTFL: returns where the shortest of these runs end."""
    rows, lines = by_kind(data[data.tag == "return"]), []
    for task, group in rows[rows.name.isin(COLUMNS) & rows.c.isna()].groupby("task", sort=False):
        kinds = group.groupby("name")
        if {"MBPO", "FTFL"} <= {*kinds.groups}:
            step = kinds.length.max().min()
            line = {"task": task, "steps": f"{step:,}", "seeds": kinds.seed.nunique().max()}
            cells = group[group.step == step].groupby("name").value.agg(cell)
            lines.append(line | {kind: cells.get(kind, "") for kind in COLUMNS})
    return markdown(pd.DataFrame(lines))


def means(data: pd.DataFrame, task: str, name: str, step: str = "", tag: str = "return") -> str:
    """A tag of an experiment's runs at a step, or its median over steps M-N, or its course."""
    rows = data[(data.task == task) & (data.exp_name == name) & (data.tag == tag)]
    first, _, last = step.partition("-")
    rows = rows[rows.step.between(int(first), int(last or first))] if step else rows
    if rows.empty:
        raise InputError(f"no recorded run of {name} on {task} has {tag} at step {step or 0}")
    if step:
        return cell(rows.groupby("seed").value.median())
    return ", ".join(rows.groupby("step").value.agg(cell))


def draw(axis: plt.Axes, points: pd.DataFrame, x: str, title: str, palette: dict) -> None:
    """A line per run or kind (column name), through means over seeds, in their range."""
    how = {"errorbar": ("pi", 100), "palette": palette, "marker": "o", "markersize": 4}
    sns.lineplot(points, x=x, y="value", hue="name", ax=axis, **how).set(title=title, ylabel=None)
    axis.get_legend().remove()  # the figure has one


def draw_returns(axis: plt.Axes, rows: pd.DataFrame, palette: dict) -> None:
    """The returns of one task by step, and what others report; Gymnasium's without version."""
    task, rows = rows.task.iloc[0], rows[rows.tag == "return"]
    draw(axis, rows, "step", f"{task}\nmean return", palette)
    points = pd.read_csv(ROOT / "benchmarks/published.csv")
    points["marker"] = [*map("osD^vPX".__getitem__, pd.factorize(points.algorithm)[0] % 7)]
    points = points[points.task.isin([task, task.split("-v")[0]])]
    points = points[points.step <= rows.step.max()].groupby(["algorithm", "source"], sort=False)
    for (algorithm, source), line in points:
        how = {"color": "0.3", "label": f"{algorithm}\n({source})"}
        if line.seeds.isna().all():  # a level, of no runs
            axis.axhline(line["mean"].iloc[0], linestyle=":", **how)
        else:
            how |= {"fmt": line.marker.iloc[0], "markersize": 4, "capsize": 3}
            axis.errorbar(line.step, line["mean"], line["std"], **how)


def draw_units(axis: plt.Axes, points: pd.DataFrame, what: str, scale: str) -> None:
    """Values where the model learns c r, by Var[s' - s] / Var[c r]; and where tasks stand."""
    scales = pd.read_csv(RESULTS / "mechanism/scales.csv", index_col="task").residual_over_reward
    points = points.assign(x=scales[UNITS_TASK] / points.c.fillna("1").astype(float) ** 2)
    draw(axis, points, "x", f"{UNITS_TASK}\n{what}", COLORS)
    axis.set(xscale="log", yscale=scale, xlabel="variance of s' - s / variance of the reward")
    top = axis.secondary_xaxis("top")
    top.set_xticks(scales, scales.index.str.removeprefix("dmc/"), rotation=90, fontsize="x-small")
    top.tick_params(which="minor", top=False)


def errors_of(folder: str) -> pd.DataFrame:
    """Of one fit to 5,000 random transitions, the reward's errors at new actions, by kind."""
    one = "schedule == 'one fit' and transitions == 5000 and data == 'random' and set == 'actions'"
    rows = pd.read_csv(RESULTS / folder / "errors.csv").query(one)
    cell = rows.cell.where(rows.beta == 0, rows.cell + ", beta")
    return by_kind(rows.assign(value=rows.reward, cell=cell), "cell")


def with_legend(figure: plt.Figure) -> plt.Figure:
    """A figure with one legend, of all its panels."""
    each = [axis.get_legend_handles_labels() for axis in figure.axes]
    shown = {label: handle for part in each for handle, label in zip(*part, strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right", fontsize="small")
    return figure


def evidence(data: pd.DataFrame) -> plt.Figure:
    """The README's figure: the reward's error by unit and in a fit, and returns on two tasks."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    last = errors_of("units").query("updates == updates.max()")
    draw_units(axes[0, 0], last, "error of the model's reward / its variance", "log")
    errors = errors_of("mechanism").query("task == @FITTED")
    draw(axes[0, 1], errors, "updates", f"{FITTED}\nerror of r / variance of r", COLORS)
    axes[0, 1].set(xscale="log", yscale="log", xlabel="gradient steps of a fit")
    for axis, task in zip(axes[1], LEARNED, strict=True):
        draw_returns(axis, by_kind(data[data.task == task]), COLORS)
    return with_legend(figure)


def shares() -> pd.DataFrame:
    """Of each dimension of s' y, its error by FTFL / by the ablation, and x, 2 (1 - rho)."""
    rows = pd.read_csv(RESULTS / "representation/dimensions.csv").query("set == 'actions'")
    rows = rows.eval("value = error + spread").dropna(subset="rho")
    points = rows.pivot_table("value", ["task", "dimension", "rho"], "cell").reset_index()
    return points.assign(x=2 - 2 * points.rho, y=points["unit s'"] / points["unit s' - s"])


def by_rho(_) -> str:
    """How the dimensions of s' with a like rho fare, as a Markdown table."""
    points = shares()
    bands = points.groupby(pd.cut(points.x.rename("2 (1 - rho)"), [0, 0.01, 0.1, 1, 4]))
    table = bands.y.describe()[["count", "25%", "50%", "75%"]].astype({"count": int})
    return markdown(table.reset_index().rename(columns={"count": "dimensions", "50%": "median"}))


def repairs(data: pd.DataFrame) -> plt.Figure:
    """What the unit of the reward does to the return, and each dimension's rho to the error."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 4.8), layout="constrained")
    rows = by_kind(data.query("task == @UNITS_TASK and tag == 'return' and step == 15_000"))
    draw_units(axes[0], rows.query("name != 'SAC'"), "return at 15,000 steps", "linear")
    points = shares()
    sns.scatterplot(points, x="x", y="y", hue="task", style="task", ax=axes[1]).legend_.remove()
    axes[1].axhline(1, lw=0.7)
    axes[1].set(xscale="log", yscale="log", xlabel="2 (1 - rho)", ylabel="error: FTFL / ablation")
    return with_legend(figure)


def curves(data: pd.DataFrame) -> plt.Figure:
    """A panel per task, with all its runs."""
    panels = data.assign(name=data.run).groupby("task", sort=False)
    height = math.ceil(len(panels) / 3)  # in panels
    how = {"figsize": (18, 3.8 * height), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(height, 3, **how)
    palette = {run: plt.cm.tab20(i % 20) for i, run in enumerate(sorted({*data.run}))}
    for axis, (_, rows) in zip(axes.flat, panels, strict=False):
        draw_returns(axis, rows, palette)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return with_legend(figure)


def diff_text(_) -> str:
    """`diff mbpo.py mbpo_ftfl.py` without the hunks of the docstrings at the top."""
    command = ["diff", "mbpo.py", "mbpo_ftfl.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    top = (ROOT / "mbpo.py").read_text().split("\nimport")[0].count("\n")
    hunks = re.findall(r"^(\d+)(.*\n(?:[<>-].*\n)*)", lines, re.M)
    shown = "".join(line + rest for line, rest in hunks if int(line) > top)
    return f"```diff\n{shown}```"


def filled(text: str, data: pd.DataFrame) -> str:
    """A README with what stands between <!-- name words --> and <!-- /name --> made anew."""
    parts = {"summary": summary, "mean": means, "course": means, "diff": diff_text}
    parts |= {"diffs": lambda _: diffs.table(), "rho": by_rho}

    def part(found: re.Match) -> str:
        begin, name, words, old, end = found.groups()
        file = RESULTS / f"{name}.md"  # by another tool, if there is no such part
        new = file.read_text().strip() if file.exists() else "Not measured yet."
        new = parts[name](data, *words.split()) if name in parts else new
        line = "\n" * old.startswith("\n")  # or it is a part of a sentence
        return f"{begin}{line}{new}{line}{end}"

    return re.sub(r"(<!-- ([^\s/]\S*)([^>]*) -->)(.*?)(<!-- /\2 -->)", part, text, flags=re.S)


def report(options: Options) -> None:
    """Prints a table, writes or checks what is made of the runs, or records some."""
    if options.write + options.check + bool(options.record) > 1:
        raise InputError("give one of --write, --check and --record")
    if options.record:
        return record(options.record, options.results)
    data = load(options.results)
    if not options.write and not options.check:
        return print(table(data))
    texts = {options.results / "report.md": f"![Mean returns](curves.png)\n\n{table(data)}\n"}
    if own := options.results.resolve() == RESULTS:
        texts = {readme: filled(readme.read_text(), data) for readme in READMES}
    if options.check:
        old = [path for path in texts if not path.exists() or path.read_text() != texts[path]]
        print(*(f"{path} is out of date: give --write\n" for path in old), sep="", end="")
        sys.exit(1 if old else 0)
    for path, text in texts.items():
        path.write_text(text)
    for figure in [curves, evidence, repairs] if own else [curves]:
        file = options.results / f"{figure.__name__}.png"
        figure(data).savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    run_tool(report, Options, __doc__)
