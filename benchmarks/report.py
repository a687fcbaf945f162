"""Tables of the recorded runs beside published figures, and the parts of README.md made from files.

python benchmarks/report.py            prints the table
python benchmarks/report.py --write    puts table and diff into README.md, between their markers

A run is a folder benchmarks/results/<env id>__<experiment>__<seed>/ with its own eval.csv and
args.json; published figures stand, with their source, in benchmarks/published.csv.
"""

import csv
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV file by column name."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def recorded_runs() -> dict:
    """Returns {(task, steps, experiment, updates per step): {seed: {step: mean return}}}."""
    groups = defaultdict(dict)
    for path in sorted(RESULTS.glob("*__*__*/eval.csv")):
        args = json.loads((path.parent / "args.json").read_text())
        key = (args["env_id"], args["total_timesteps"], args["exp_name"], args["updates_per_step"])
        curve = {int(row["step"]): float(row["mean"]) for row in read_csv(path)}
        groups[key][args["seed"]] = curve
    return dict(groups)


def cell(values: list[float]) -> str:
    """Mean over seeds, and each seed's own value where there are several."""
    if not values:
        return ""
    each = f" ({', '.join(f'{value:.0f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.0f}{each}"


def results_table() -> str:
    """A Markdown table per task and length: our runs, then what others published."""
    runs, published = recorded_runs(), read_csv(ROOT / "benchmarks" / "published.csv")
    tables = []
    for task, length in sorted({key[:2] for key in runs}):
        steps = [step for step in (10_000, 15_000, 20_000, 40_000, 50_000) if step <= length]
        steps = steps[-3:] if length <= 20_000 else [20_000, 40_000, 50_000]
        lines = [
            f"**{task}**, mean return at environment step ... (each seed)\n",
            "| run | seeds | " + " | ".join(f"{step:,}" for step in steps) + " |",
            "|---|---|" + "---|" * len(steps),
        ]
        for (*where, name, updates), seeds in sorted(runs.items(), key=lambda item: item[0][2]):
            if where == [task, length]:
                title = f"`{name}`, {updates} update{'s' * (updates > 1)} per step"
                cells = [cell([c[step] for c in seeds.values() if step in c]) for step in steps]
                lines.append(f"| {title} | {len(seeds)} | " + " | ".join(cells) + " |")
        quoted = defaultdict(dict)
        for row in published:
            if task.startswith(row["task"]) and int(row["length"]) == length:
                name = f"{row['algorithm']} ({row['source']})", row["seeds"]
                quoted[name][int(row["step"])] = f"{row['mean']} +- {row['std']}"
        for (name, seeds), at in quoted.items():
            cells = [at.get(step, "") for step in steps]
            lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def diff_block() -> str:
    """The output of `diff mbpo.py mbpo_ftfl.py`, fenced."""
    command = ["diff", "mbpo.py", "mbpo_ftfl.py"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return f"```diff\n{text}```"


def timing_text() -> str:
    """What the README's two commands take, as benchmarks/time_readme.py measured it."""
    path = RESULTS / "readme_commands.json"
    if not path.exists():
        return "Not timed yet."
    took = json.loads(path.read_text())
    return f"""\
On {took["cores"]} CPU cores, with Python {took["python"]} and a near package mirror, the first
installs in {took["install_seconds"] / 60:.1f} minutes, prints a return of
{took["untrained_return"]:.2f} for the untrained policy at once, and reaches the evaluation at step
10,000, after the random steps and the first fit, in {took["first_fit_seconds"] / 60:.1f} minutes.
All 500,000 steps are ten million updates: a job for a GPU, or for days. The second runs
{took["tests_passed"]} tests in {took["test_seconds"] / 60:.0f} minutes; in them each script must
learn a real task."""


def main() -> None:
    """Prints the table, or writes all generated parts into README.md."""
    parts = {"diff": diff_block(), "timing": timing_text(), "results": results_table()}
    if "--write" not in sys.argv[1:]:
        print(parts["results"])
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, part in parts.items():
        block = f"<!-- {name} -->\n{part}\n<!-- /{name} -->"
        pattern = rf"<!-- {name} -->.*<!-- /{name} -->"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
