"""Tables, statements and pictures of what benchmarks/mechanism.py measured; it calls `present`.

Errors are sampled ones, of the reward and of the state in units of their variance, and of the
change, which is the state in units of the variance of s' - s; see mechanism.py for the equations.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")  # pictures without a display
from matplotlib import pyplot as plt

CELLS = ["raw residual", "raw direct", "normalized residual", "normalized direct"]
CELLS += ["normalized per-dimension", "normalized ridge"]
ENDS = CELLS[2:4]  # of the line on which w per dimension lies
METRICS = {"reward_sampled": "reward", "state_sampled": "state", "change_sampled": "change"}
QUESTIONS = [  # what is changed, the cell that has it, the cells it is held against
    ("Normalizing what MBPO predicts", "normalized residual", ["raw residual"]),
    ("Normalizing where s' is predicted", "normalized direct", ["raw direct"]),
    ("Predicting s' instead of s' - s, raw", "raw direct", ["raw residual"]),
    ("Predicting s' instead of s' - s, normalized", "normalized direct", ["normalized residual"]),
    ("Both repairs at once", "normalized direct", ["raw residual"]),
    ("Predicting s' - w s - c, w per dimension", "normalized per-dimension", ENDS),
    ("Predicting what ridge regression leaves", "normalized ridge", ENDS),
]


def by_policy(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of random policies, and those of trained ones, where there are any."""
    random = table.data == "random"
    groups = {"Random policy": table[random], "Trained policies": table[~random]}
    return {name: rows for name, rows in groups.items() if len(rows)}


def name_of(task: str, data: str) -> str:
    """The task, or for the data of a trained policy its run folder, which names the task."""
    return task if data == "random" else data


def listed(values, form: str = "{}") -> str:
    """`1, 2 and 3`."""
    *first, last = (form.format(value) for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, three digits to a number."""
    table = table.map(lambda value: f"{value:.3g}" if isinstance(value, float) else str(value))
    return table.to_markdown(index=False, disable_numparse=True)


def summary(fits: pd.DataFrame) -> str:
    """What became of each cell, medians over tasks of the means over seeds; and the verdicts."""
    blocks = []
    for group, rows in by_policy(fits[fits.updates > 0]).items():
        means = rows.groupby(["cell", "updates", "task", "data"]).mean(numeric_only=True)
        medians = means.groupby(level=["cell", "updates"]).median()
        table = pd.DataFrame({"target": [f"`{cell}`" for cell in CELLS]})
        for metric, title in METRICS.items():
            for n in sorted({*fits.updates} - {0}):
                column = medians[metric].xs(n, level="updates")
                table[f"{title}, {n:,}"] = column[CELLS].to_list()
        count = len(rows.groupby(["task", "data"]))
        title = f"**{group}**: sampled errors after so many updates, medians of {count}"
        blocks.append(f"{title}\n\n{markdown(table)}\n\n{verdicts(rows)}\n")
    return "\n".join(blocks)


def verdicts(rows: pd.DataFrame) -> str:
    """On how many tasks each change lowers the errors in the end, in a line each."""
    last, lines = rows[rows.updates == rows.updates.max()], []
    means = last.groupby(["task", "data", "cell"]).mean(numeric_only=True)
    for question, cell, others in QUESTIONS:
        parts = []
        for metric, title in METRICS.items():
            wide = means[metric].unstack("cell")
            factor = (wide[cell] / wide[others].min(axis=1)).dropna()
            counted = f"{(factor < 1).sum()} of {len(factor)}"
            parts.append(f"{title} {counted} (median factor {factor.median():.2g})")
        lines.append(f"- {question} lowers the error after {last.updates.max():,} updates of:")
        lines.append(f"  {'; '.join(parts)}.")
    return "\n".join(lines)


def compare(rows: pd.DataFrame, metric: str, cell: str, others: list[str]) -> str:
    """How often, and by how much, a cell's error is below the least of the others'."""
    index = ["updates", "task", "data"]
    wide = rows.set_index([*index, "seed", "cell"])[metric].unstack("cell")
    means = wide.groupby(level=index).mean()
    every = (wide[cell] < wide[others].min(axis=1)).groupby(level=index).all()
    factors = means[cell] / means[others].min(axis=1)
    parts = [part.dropna() for _, part in factors.groupby(level="updates")]
    lower, factor = (
        listed((f < 1).sum() for f in parts),
        listed((f.median() for f in parts), "{:.2g}"),
    )
    seeds = listed(part.sum() for _, part in every.groupby(level="updates"))
    text = f"on {lower} of {len(parts[-1])} (by every seed on {seeds}), median factor {factor}"
    worse = [name_of(*key[1:]) for key in parts[-1].index[parts[-1] >= 1]]
    return text + (f"; in the end not on {listed(worse)}" if worse else "")


def answers(fits: pd.DataFrame, dimensions: pd.DataFrame) -> str:
    """What the figures say for and against each change of targets, counted."""
    lines, updates = [], sorted({*fits.updates} - {0})
    after = f"Sampled errors after {listed(updates, '{:,}')} updates, as mean"
    for group, rows in by_policy(fits[fits.updates > 0]).items():
        lines.append(f"**{group}.** {after}")
        lines.append(f"of the seeds ({rows.seed.nunique()}); a factor below 1 is an improvement.")
        for question, cell, others in QUESTIONS:
            against = listed(others, "`{}`")
            against += ", the better of the two each time" if others[1:] else ""
            lines += ["", f"{question} (`{cell}` against {against}) lowers the error", ""]
            for metric, title in METRICS.items():
                lines.append(f"- of the {title} {compare(rows, metric, cell, others)}.")
        lines += ["", "Dimensions of the state by their one-step autocorrelation rho: error after"]
        lines += [f"{updates[-1]:,} updates, as a factor of that of `normalized residual`.", ""]
        lines += [markdown(by_autocorrelation(by_policy(dimensions)[group])), ""]
    return "\n".join(lines)


def by_autocorrelation(dimensions: pd.DataFrame) -> pd.DataFrame:
    """Where each normalized target beats s' - s: counts and median factors by bins of rho."""
    rho = pd.cut(dimensions.rho, [-np.inf, 0, 0.5, 0.9, 0.99, np.inf], right=False)
    bins = dimensions.groupby(rho, observed=True)
    table = pd.DataFrame({"rho": map(str, bins.groups), "dimensions": bins.size().to_list()})
    for cell in CELLS[3:]:
        factors = dimensions[cell] / dimensions["normalized residual"]
        kind, parts = cell.split()[1], factors.groupby(rho, observed=True)
        table[f"{kind}: lower in"] = parts.agg(lambda f: (f < 1).sum()).astype(int).to_list()
        table[f"{kind}: median factor"] = parts.median().to_list()
    return table


def tables(scales: pd.DataFrame, fits: pd.DataFrame) -> str:
    """The scales of all tasks, and of each the errors of all cells: mean over seeds +- std."""
    settings = ["transitions", "hidden", "budgets", "seeds"]
    lines = ["## Scales", "", markdown(scales.drop(columns=settings))]
    for (task, data), rows in fits[fits.updates > 0].groupby(["task", "data"]):
        table = pd.DataFrame({"target": CELLS})
        for metric in METRICS:
            for n, part in rows.groupby("updates"):
                seeds = part.groupby("cell")[metric].agg(["mean", "std"]).loc[CELLS].fillna(0)
                text = [f"{mean:.3g} +- {std:.1g}" for mean, std in seeds.itertuples(index=False)]
                table[f"{metric.replace('_', ' ')}, {n:,}"] = text
        lines += ["", f"## {task}, policy: {data}", "", markdown(table)]
    return "\n".join([*lines, ""])


def draw_scales(scales: pd.DataFrame, file: Path) -> None:
    """How much more the states vary than the reward, in both kinds of targets."""
    names, places = list(map(name_of, scales.task, scales.data)), np.arange(len(scales))
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.28 * len(names)), layout="constrained")
    axes.barh(places, scales.residual_over_reward, 0.35, label="s' - s")
    axes.barh(places + 0.35, scales.direct_over_reward, 0.35, label="s'")
    axes.set_yticks(places + 0.17, names)
    axes.set(xscale="log", xlabel="total variance of the state target / variance of the reward")
    axes.axvline(1, color="black", lw=1)
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=100)


def draw_errors(fits: pd.DataFrame, metric: str, file: Path) -> None:
    """One panel per task and policy: error by updates; bands from the least to the worst seed."""
    groups = fits[fits.updates > 0].groupby(["task", "data"])
    lines = -(-len(groups) // 4)
    figure, grid = plt.subplots(
        lines, 4, figsize=(12, 0.8 + 2 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(groups) :]:
        axes.axis("off")
    for axes, (key, rows) in zip(grid.flat, groups, strict=False):
        for number, cell in enumerate(CELLS):
            seeds = rows[rows.cell == cell].groupby("updates")[metric]
            mean, line = seeds.mean(), "--" if cell.startswith("raw") else "-"
            axes.plot(mean, line, color=f"C{number}", marker=".", label=cell)
            band = {"color": f"C{number}", "alpha": 0.2, "lw": 0}
            axes.fill_between(mean.index, seeds.min(), seeds.max(), **band)
        axes.set_title(name_of(*key), fontsize=9)
        axes.set(xscale="log", yscale="log", xticks=mean.index, xticklabels=mean.index)
        axes.minorticks_off()
    figure.supxlabel("updates")
    figure.supylabel(f"sampled error of the {METRICS[metric]}")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(file, dpi=100)


def draw_dimensions(dimensions: pd.DataFrame, file: Path) -> None:
    """Where predicting s' pays: below 1, by the autocorrelation of the dimension."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for group, rows in by_policy(dimensions).items():
        ratio = rows["normalized direct"] / rows["normalized residual"]
        axes.scatter((1 - rows.rho).clip(lower=1e-7), ratio, s=8, alpha=0.6, label=group)
    axes.axvline(0.5, color="gray", lw=1, label="rho = 1/2")
    axes.axhline(1, color="black", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="1 - rho, with rho the one-step autocorrelation")
    axes.set_ylabel("error predicting s' / error predicting s' - s")
    axes.legend()
    figure.savefig(file, dpi=100)


def present(held: dict[str, pd.DataFrame], out: Path) -> None:
    """Writes summary.md, answers.md, tables.md and the pictures, from the CSV files' tables."""
    scales, fits, dimensions = (held[name] for name in ("scales", "fits", "dimensions"))
    (out / "summary.md").write_text(summary(fits))
    (out / "answers.md").write_text(answers(fits, dimensions))
    (out / "tables.md").write_text(tables(scales, fits))
    draw_scales(scales, out / "scales.png")
    for metric, title in METRICS.items():
        draw_errors(fits, metric, out / f"errors_{title}.png")
    draw_dimensions(dimensions, out / "dimensions.png")
    plt.close("all")
