"""The variants in benchmarks/diffs/ as a table; each is a patch that applies to several scripts.

    patch -o mbpo_ftfl_ridge.py mbpo_ftfl.py benchmarks/diffs/ridge.diff
    python benchmarks/diffs.py           prints the table, made from the files
    python benchmarks/diffs.py --write   renews it in benchmarks/README.md
    python benchmarks/diffs.py --make    writes all patched scripts into build/, for sweep.py

What `patch` makes is again one self-contained script, with all the flags of the other one and its
own name for the run folder.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
DIFFS = sorted((ROOT / "benchmarks/diffs").glob("*.diff"))
SCRIPTS = ("sac", "mbpo", "mbpo_ftfl", "mbpo_residual_ablation")
README = ROOT / "benchmarks/README.md"
MARKS = "<!-- diffs -->\n", "<!-- /diffs -->"


def apply(diff: Path, script: str, out: Path) -> bool:
    """Writes the patched script to a file; False if the diff does not apply exactly."""
    command = ["patch", "--silent", "--force", "--fuzz=0", "--reject-file=-", f"--output={out}"]
    done = subprocess.run([*command, ROOT / f"{script}.py", diff], capture_output=True)
    return done.returncode == 0


def changed_lines(diff: Path) -> int:
    """Lines that a diff adds or takes away."""
    lines = diff.read_text().splitlines()
    return sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in lines if line)


def table() -> str:
    """Name, what it does, source, changed lines and scripts of every diff, in Markdown."""
    rows = []
    for diff in DIFFS:
        what, source, *_ = (line.partition(": ")[2] for line in diff.read_text().splitlines())
        scripts = [name for name in SCRIPTS if apply(diff, name, Path("/dev/null"))]
        names = "all four" if len(scripts) == 4 else "the three with a model"
        assert len(scripts) >= 3, f"{diff.name} applies to no more than {scripts}"
        rows.append([f"[{diff.stem}](diffs/{diff.name})", what, source, changed_lines(diff), names])
    columns = ["diff", "what it changes", "source", "changed lines", "applies to"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False, tablefmt="github")


if __name__ == "__main__":
    made = f"{table()}\n"
    if sys.argv[1:] == ["--write"]:
        before, _, rest = README.read_text().partition(MARKS[0])
        README.write_text(before + MARKS[0] + made + MARKS[1] + rest.partition(MARKS[1])[2])
    elif sys.argv[1:] == ["--make"]:
        (ROOT / "build").mkdir(exist_ok=True)
        for diff, script in itertools.product(DIFFS, SCRIPTS):
            out = ROOT / "build" / f"{script}_{diff.stem}.py"
            if not apply(diff, script, out):
                out.unlink()
    else:
        print(made, end="")
