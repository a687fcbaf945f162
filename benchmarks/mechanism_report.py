"""Tables, statements and pictures of what mechanism.py measured, from its CSV files alone.

Errors are sampled ones, of the reward and of the state in units of their variance, and of the
change, which is the state in units of the variance of s' - s; see mechanism.py for the equations.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from common import markdown
from mechanism_fit import CELLS

matplotlib.use("Agg")  # pictures without a display
from matplotlib import pyplot as plt

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
RESIDUAL = CELLS[2]  # what `updates-needed` holds the others against
PARTS = {  # of `updates-needed`: column and words
    "reward_sampled": "reward",
    "slow_sampled": "slow dimensions",
    "fast_sampled": "fast dimensions",
}


def by_policy(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of random policies, and those of trained ones, where there are any."""
    random = table.data == "random"
    groups = {"Random policy": table[random], "Trained policies": table[~random]}
    return {name: rows for name, rows in groups.items() if len(rows)}


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the task, or for the data of a run its folder, which names the task."""
    return table.assign(name=table.task.where(table.data == "random", table.data))


def summary(fits: pd.DataFrame) -> str:
    """What became of each cell, medians over tasks of the means over seeds; and the verdicts."""
    blocks = []
    for group, rows in by_policy(fits[fits.updates > 0]).items():
        means = rows.groupby(["cell", "updates", "task", "data"]).mean(numeric_only=True)
        medians = means.groupby(level=["cell", "updates"]).median()
        table = pd.DataFrame({"target": [f"`{cell}`" for cell in CELLS]})
        for metric, title in METRICS.items():
            for n in sorted({*rows.updates}):
                table[f"{title}, {n:,}"] = medians[metric].xs(n, level="updates")[CELLS].to_list()
        count = len(rows.groupby(["task", "data"]))
        heading = f"**{group}**: sampled errors after so many updates, medians of {count}"
        last = rows[rows.updates == rows.updates.max()]
        lines = []
        for question, cell, others in QUESTIONS:
            found = {
                title: compare(last, metric, cell, others) for metric, title in METRICS.items()
            }
            counts = [
                f"{title} {row['lower on']} (median factor {row['median factor']:.2g})"
                for title, table_ in found.items()
                for row in table_.to_dict("records")
            ]
            lines.append(f"- {question} lowers the error after {last.updates.max():,} updates of:")
            lines.append(f"  {'; '.join(counts)}.")
        blocks.append("\n\n".join([heading, markdown(table), "\n".join(lines)]) + "\n")
    return "\n".join(blocks)


def compare(rows: pd.DataFrame, metric: str, cell: str, others: list[str]) -> pd.DataFrame:
    """By number of updates: on how many tasks a cell's error is below the least of the others'.

    Errors are means over seeds; `by every seed` counts where each seed alone says the same.
    """
    index, lines = ["updates", "name"], []
    wide = named(rows).set_index([*index, "seed", "cell"])[metric].unstack("cell")
    every = (wide[cell] < wide[others].min(axis=1)).groupby(level=index).all()
    means = wide.groupby(level=index).mean()
    factors = (means[cell] / means[others].min(axis=1)).dropna()
    for updates, part in factors.groupby(level="updates"):
        lines.append({"updates": f"{updates:,}", "lower on": f"{(part < 1).sum()} of {len(part)}"})
        lines[-1] |= {"by every seed": f"{every.loc[part.index].sum()}"}
        lines[-1] |= {"median factor": float(part.median())}
        lines[-1] |= {"not on": ", ".join(part.index.get_level_values("name")[part >= 1])}
    return pd.DataFrame(lines)


def answers(fits: pd.DataFrame, dimensions: pd.DataFrame) -> str:
    """What the figures say for and against each change of targets, counted."""
    blocks = []
    for group, rows in by_policy(fits[fits.updates > 0]).items():
        seeds = f"as mean of the seeds ({rows.seed.nunique()}); below 1 is an improvement"
        blocks.append(f"**{group}.** Factors of the sampled error, {seeds}.")
        for question, cell, others in QUESTIONS:
            against = " and ".join(f"`{other}`" for other in others)
            against += ", the better of the two each time" if others[1:] else ""
            blocks.append(f"{question} (`{cell}` against {against}):")
            found = [
                compare(rows, metric, cell, others).assign(error=title)
                for metric, title in METRICS.items()
            ]
            blocks.append(markdown(pd.concat(found).set_index("error").reset_index()))
        blocks.append(
            "Dimensions of the state by their one-step autocorrelation rho: error after "
            f"{rows.updates.max():,} updates, as a factor of that of `normalized residual`."
        )
        blocks.append(markdown(by_autocorrelation(by_policy(dimensions)[group])))
    return "\n\n".join([*blocks, ""])


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
    blocks = ["## Scales", markdown(scales.drop(columns=settings))]
    for (task, data), rows in fits[fits.updates > 0].groupby(["task", "data"]):
        table = pd.DataFrame({"target": CELLS})
        for metric, title in METRICS.items():
            for n, part in rows.groupby("updates"):
                seeds = part.groupby("cell")[metric].agg(["mean", "std"]).loc[CELLS].fillna(0)
                text = [f"{mean:.3g} +- {std:.1g}" for mean, std in seeds.itertuples(index=False)]
                table[f"{title}, {n:,}"] = text
        blocks += [f"## {task}, policy: {data}", markdown(table)]
    return "\n\n".join([*blocks, ""])


def draw_errors(fits: pd.DataFrame, metrics: dict[str, str], file: Path, **layout) -> None:
    """Error by updates: mean of the seeds, and bands from the least to the worst of them.

    The layout says which of the names of data sets and of metrics go to rows and columns.
    """
    cells = [cell for cell in CELLS if cell in {*fits.cell}]
    index = ["name", "cell", "seed", "updates"]
    long = named(fits)[fits.updates > 0].melt(index, [*metrics], "error of")
    long["error of"] = long["error of"].map(metrics)
    panels = {"height": 2.4, "aspect": 1.2}
    panels["facet_kws"] = {"sharey": "row" if "row" in layout else False, "margin_titles": True}
    lines = {"hue": "cell", "hue_order": cells, "style": "cell", "style_order": cells}
    lines |= {"kind": "line", "errorbar": ("pi", 100), "x": "updates", "y": "value"}
    grid = sns.relplot(long, **lines, **panels, **layout)
    grid.set(xscale="log", yscale="log").set_ylabels("sampled error").refline(y=1, lw=0.7)
    grid.set_titles("{col_name}", row_template="{row_name}", size=8)
    grid.savefig(file, dpi=100)
    plt.close(grid.figure)


def present(dimensions: pd.DataFrame, fits: pd.DataFrame, scales: pd.DataFrame, out: Path) -> None:
    """Writes summary.md, answers.md, tables.md and the pictures."""
    (out / "summary.md").write_text(summary(fits))
    (out / "answers.md").write_text(answers(fits, dimensions))
    (out / "tables.md").write_text(tables(scales, fits))
    for metric, title in METRICS.items():
        draw_errors(fits, {metric: title}, out / f"errors_{title}.png", col="name", col_wrap=4)


def when(holds: pd.Series, values: pd.Series, word: str) -> str:
    """From what number of updates on, or never; with the last value unless it holds in the end."""
    known = values.notna()
    if not known.any():
        return "-"
    holds, values = holds[known], values[known]
    last = f"{word} {values.iloc[-1]:.2g} at {values.index[-1]:,}"
    first = f"{holds.idxmax():,}" if holds.any() else "never"
    return first if holds.iloc[-1] else f"{first} ({last})"


def table_needed(fits: pd.DataFrame) -> pd.DataFrame:
    """By data set and part, after how many updates each target gets below 1 and to the residual."""
    lines, cells = [], [cell for cell in CELLS if cell in {*fits.cell}]
    for (name, slow, fast), rows in named(fits).groupby(["name", "slow_dims", "fast_dims"]):
        for metric, part in PARTS.items():
            errors = rows.pivot_table(metric, "updates", "cell", dropna=False)
            line = {"data": f"{name} ({slow} slow, {fast} fast)", "sampled error of": part}
            for cell in cells:
                kind, error = cell.split()[-1], errors.get(cell, pd.Series(dtype=float))
                line[f"{kind}: below 1"] = when(error < 1, error, "error")
            for cell in cells if RESIDUAL in errors else ():
                kind, factor = cell.split()[-1], errors.get(cell, np.nan) / errors[RESIDUAL]
                if cell != RESIDUAL:
                    line[f"{kind} reaches residual"] = when(factor <= 1.1, factor, "factor")
                    line[f"{kind} overtakes residual"] = when(factor < 0.9, factor, "factor")
            lines.append(line)
    return pd.DataFrame(lines).fillna("-")


def summary_needed(fits: pd.DataFrame) -> str:
    """For the README: when predicting s' is as good as predicting s' - s, and when better."""
    lines = []
    for name, rows in named(fits[fits.lr == "0.001"]).groupby("name"):
        line = {"data": name}
        for metric, part in PARTS.items():
            errors = rows.pivot_table(metric, "updates", "cell")
            if not {"normalized direct", RESIDUAL} <= {*errors}:
                continue
            factor = (errors["normalized direct"] / errors[RESIDUAL]).dropna()
            reached, better = factor.index[factor <= 1.1], factor.index[factor < 0.9]
            words = [f"{min(x):,}" if len(x) else "never" for x in (reached, better)]
            line[part] = f"{' / '.join(words)} ({factor.iloc[-1]:.2f})"
        lines.append(line | {"seeds": rows.seed.nunique()})
    return (
        "Updates until the sampled error of predicting s' is at most 10 % above that of predicting "
        "s' - s, both at unit scale /\nuntil it is more than 10 % below (in brackets: the ratio at "
        f"{fits.updates.max():,}). Slow: Var(s' - s) < 0.1 Var(s).\n\n"
        + markdown(pd.DataFrame(lines).fillna("-"))
        + "\n"
    )


def present_needed(fits: pd.DataFrame, out: Path) -> None:
    """Writes needed.md, summary.md and the pictures: needed.png at the scripts' step size, 1e-3."""
    blocks = []
    for lr, rows in fits[fits.updates > 0].groupby("lr"):
        blocks += [
            f"## Adam step size {lr}",
            f"Sampled errors, means of {rows.seed.nunique()} seeds: of the reward in units of "
            "Var(r), of each dimension of the state in units of Var(s'_i - s_i), which is below a "
            "tenth of Var(s_i) in slow ones. Below 1, reaches (at most 10 % above the residual's "
            "after as many updates) and overtakes (more than 10 % below it) name the first "
            "measurement at which that holds; in brackets stands how it ends, unless it holds at "
            "the last, too.",
            markdown(table_needed(rows)),
        ]
        file = out / ("needed.png" if lr == "0.001" else f"needed_lr_{lr}.png")
        draw_errors(rows, PARTS, file, row="error of", col="name")
    (out / "needed.md").write_text("\n\n".join([*blocks, ""]))
    (out / "summary.md").write_text(summary_needed(fits[fits.updates > 0]))
