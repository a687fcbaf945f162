"""Tables, statements and pictures of what benchmarks/mechanism.py measured.

It calls `present` or, for `updates-needed`, `present_needed`.

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


def data_sets(fits: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Name and rows of each data set of `updates-needed`, buffers of runs first."""
    order = fits.assign(is_random=fits.data == "random")
    return [(name_of(*key[1:]), rows) for key, rows in order.groupby(["is_random", "task", "data"])]


def when(holds: pd.Series, values: pd.Series, word: str) -> str:
    """From what number of updates on, or never; with the last value unless it holds in the end."""
    known = values.notna()
    if not known.any():
        return "-"
    holds, values = holds[known], values[known]
    last = f"{word} {values.iloc[-1]:.2g} at {values.index[-1]:,}"
    first = f"{holds.idxmax():,}" if holds.any() else "never"
    return first if holds.iloc[-1] else f"{first} ({last})"


def curves(fits: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Data set, part and errors [updates, cells], means over seeds."""
    cells, found = [cell for cell in CELLS if cell in {*fits.cell}], []
    for name, rows in data_sets(fits):
        for metric, part in PARTS.items():
            errors = rows.groupby(["updates", "cell"])[metric].mean().unstack("cell")
            found.append((name, part, errors.reindex(columns=cells)))
    return found


def over_residual(errors: pd.DataFrame) -> pd.DataFrame:
    """Errors [updates, cells] of the other cells, as factors of the residual's."""
    if RESIDUAL not in errors:
        return errors[[]]
    return errors.drop(columns=RESIDUAL).div(errors[RESIDUAL], axis=0)


def table_needed(fits: pd.DataFrame) -> pd.DataFrame:
    """By data set and part, after how many updates each target gets below 1 and to the residual."""
    lines = []
    for name, part, errors in curves(fits):
        line = {"data": name, "sampled error of": part}
        for cell, error in errors.items():
            line[f"{cell.split()[-1]}: below 1"] = when(error < 1, error, "error")
        for cell, factor in over_residual(errors).items():
            line[f"{cell.split()[-1]} reaches residual"] = when(factor <= 1.1, factor, "factor")
            line[f"{cell.split()[-1]} overtakes residual"] = when(factor < 0.9, factor, "factor")
        lines.append(line)
    return pd.DataFrame(lines)


def said_below(fits: pd.DataFrame) -> str:
    """When each target's error in the slow dimensions is first below what a step changes."""
    clauses, slow = [], [errors for _, part, errors in curves(fits) if part.startswith("slow")]
    for cell in slow[0]:
        known = [errors[cell].dropna() for errors in slow if errors[cell].notna().any()]
        firsts = sorted(int((e < 1).idxmax()) for e in known if (e < 1).any())
        after = f" (after {listed(firsts, '{:,}')} updates)" if firsts else ""
        clauses.append(f"of `{cell}` on {len(firsts)} of {len(known)} data sets{after}")
    return f"In slow dimensions the error falls below what a step changes: {'; '.join(clauses)}."


def said_reaches(fits: pd.DataFrame) -> str:
    """On how many data sets each target ends at, or below, the residual's error."""
    factors, clauses = [(part, over_residual(errors)) for _, part, errors in curves(fits)], []
    for cell in factors[0][1]:
        counts = []
        for part in PARTS.values():
            end = pd.concat([f[cell].dropna().iloc[-1:] for name, f in factors if name == part])
            below = f"more than 10 % below it on {(end < 0.9).sum()}"
            counts.append(f"{part} on {(end <= 1.1).sum()} of {len(end)} data sets ({below})")
        clauses.append(f"`{cell}` is at most 10 % above that of `{RESIDUAL}` in {listed(counts)}")
    end = f"In the end, after {fits.updates.max():,} updates, the error of {'; '.join(clauses)}."
    return end if clauses else ""


def needed(fits: pd.DataFrame) -> str:
    """The statements and the table of `updates-needed`, for each step size of Adam."""
    blocks = []
    for lr, rows in fits[fits.updates > 0].groupby("lr"):
        sizes = []
        for name, part in data_sets(rows):
            slow, fast = part[["slow_dims", "fast_dims"]].iloc[0]
            sizes.append(f"{name} {slow} and {fast}")
        blocks += [
            f"## Adam step size {lr}",
            f"{said_below(rows)} {said_reaches(rows)}",
            f"Sampled errors, means of {rows.seed.nunique()} seeds: of the reward in units of "
            "Var(r), of each dimension of the state in units of Var(s'_i - s_i), which is below a "
            f"tenth of Var(s_i) in slow ones. Slow and fast ones: {'; '.join(sizes)}. Below 1, "
            "reaches (at most 10 % above the residual's after as many updates) and overtakes (more "
            "than 10 % below it) name the first measurement at which that holds; in brackets "
            "stands how it ends, unless it holds at the last, too.",
            markdown(table_needed(rows)),
        ]
    return "\n\n".join([*blocks, ""])


def draw_needed(fits: pd.DataFrame, file: Path) -> None:
    """A column per data set and a row per part: error by updates, thin lines for single seeds."""
    sets, cells = data_sets(fits), [cell for cell in CELLS if cell in {*fits.cell}]
    figure, grid = plt.subplots(
        *(len(PARTS), len(sets)),
        figsize=(1.5 + 2.3 * len(sets), 7),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, (name, rows) in zip(grid.T, sets, strict=True):
        for axes, (metric, part) in zip(column, PARTS.items(), strict=True):
            for cell in cells:
                color, seeds = f"C{CELLS.index(cell)}", rows[rows.cell == cell].groupby("seed")
                for _, seed in seeds:
                    axes.plot(seed.updates, seed[metric], color=color, lw=0.7, alpha=0.6)
                mean = rows[rows.cell == cell].groupby("updates")[metric].mean()
                axes.plot(mean, color=color, lw=2, marker=".", label=cell.split()[-1])
            axes.set(xscale="log", yscale="log")
            if part != "reward":
                axes.axhline(1, color="black", ls=":", lw=1)
                count = int(rows[metric.replace("sampled", "dims")].iloc[0])
                axes.set_title(f"{count} {part}", fontsize=8)
            if rows[metric].isna().all():
                reason = "constant" if part == "reward" else "none"
                axes.text(0.5, 0.5, reason, ha="center", transform=axes.transAxes)
        source = "random policy\n" if (rows.data == "random").all() else f"buffer of\n{name}"
        column[0].set_title(f"{rows.task.iloc[0]}\n{source}", fontsize=8)
    shown = sorted({*fits.updates})[::3]
    grid[0, 0].set_xticks(shown, [f"{n:,}" for n in shown], fontsize=8)
    grid[0, 0].minorticks_off()
    grid[0, 0].set_ylabel("reward\n(1: its variance)")
    for axes, part in zip(grid[1:, 0], ("slow", "fast"), strict=True):
        axes.set_ylabel(f"{part} dimensions\n(1: change per step)")
    figure.supxlabel("updates")
    figure.supylabel("sampled error")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(cells), title="what is predicted")
    figure.savefig(file, dpi=110)


def present_needed(fits: pd.DataFrame, out: Path) -> None:
    """Writes needed.md, and the pictures: needed.png at the scripts' step size of 1e-3."""
    if not len(fits):
        return
    (out / "needed.md").write_text(needed(fits))
    for lr, rows in fits[fits.updates > 0].groupby("lr"):
        draw_needed(rows, out / ("needed.png" if lr == "0.001" else f"needed_lr_{lr}.png"))
    plt.close("all")
