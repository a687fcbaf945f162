"""The variants in benchmarks/diffs/: each is a patch that applies to several of the scripts.

patch -o mbpo_ftfl_ridge.py mbpo_ftfl.py benchmarks/diffs/ridge.diff
python benchmarks/diffs.py      writes all patched scripts into build/, for sweep.py
"""

import itertools
import subprocess
from pathlib import Path

import pandas as pd
from common import ROOT, run_tool

DIFFS = sorted((ROOT / "benchmarks/diffs").glob("*.diff"))
SCRIPTS = ("sac", "mbpo", "mbpo_ftfl", "mbpo_residual_ablation")


def patched(script: str, diff: Path) -> str | None:
    """The text of a script after a diff; None if the diff does not apply exactly."""
    command = ["patch", "--silent", "--force", "--fuzz=0", "--reject-file=-", "--output=-"]
    command += [ROOT / f"{script}.py", diff]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def origin(name: str) -> str | None:
    """The script of the four that a file of this name is, or is patched from; None if neither."""
    made = {f"{s}{end}.py": s for s in SCRIPTS for end in ["", *(f"_{x.stem}" for x in DIFFS)]}
    return made.get(name)


def table() -> str:
    """Name, what it does, source and scripts of every diff, in Markdown."""
    rows = []
    for diff in DIFFS:
        what, source, *_ = (line.partition(": ")[2] for line in diff.read_text().splitlines())
        count = sum(patched(script, diff) is not None for script in SCRIPTS)
        names = {4: "all four", 3: "the three with a model"}[count]
        rows.append([f"[{diff.stem}](diffs/{diff.name})", what, source, names])
    columns = ["diff", "what it changes", "source", "applies to"]
    return pd.DataFrame(rows, columns=columns).to_markdown(index=False)


def write(out: Path = ROOT / "build") -> None:
    """Writes every script after every diff that applies to it into a folder."""
    out.mkdir(exist_ok=True)
    for script, diff in itertools.product(SCRIPTS, DIFFS):
        if text := patched(script, diff):
            (out / f"{script}_{diff.stem}.py").write_text(text)


if __name__ == "__main__":
    run_tool(lambda _: None, write, __doc__)  # tyro calls write
