"""Times the README's three commands in a fresh clone and a fresh environment.

    python benchmarks/time_readme.py && python benchmarks/report.py --write

The first training command is stopped after the evaluation at step 10,000, which follows the random
steps and the first fit; the figures go to benchmarks/results/readme_commands.json.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import RESULTS, ROOT, run_tool


@dataclass
class Options:
    """There are none."""


def timed(command: str, **place) -> tuple[float, str]:
    """Runs a shell command to its end; returns seconds and standard output."""
    begin = time.perf_counter()
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, **place)
    if done.returncode != 0:
        sys.exit(f"error: {command} ended with {done.returncode}: {done.stdout[-2000:]}")
    return time.perf_counter() - begin, done.stdout


def time_commands(options: Options) -> None:
    """Times the commands, the tests first; writes the figures after each."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^(pip install .* && .*)$", text, flags=re.M)
    (learn,) = re.findall(r"^(python [^`]*Pendulum[^`]*)```", text, flags=re.M)
    (install, run), (install_tests, tests) = (block.split(" && ") for block in blocks[:2])
    figures = {"cores": os.cpu_count(), "python": platform.python_version()}

    def keep(**measured) -> None:
        figures.update(measured)
        (RESULTS / "readme_commands.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(measured), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        timed(f"git clone --quiet {ROOT} {clone} && {sys.executable} -m venv {folder}/venv")
        path = f"{folder}/venv/bin:{os.environ['PATH']}"
        place = {"cwd": clone, "env": os.environ | {"PATH": path}}
        seconds, _ = timed(install, **place)
        keep(install_seconds=seconds)
        timed(install_tests, **place)
        seconds, output = timed(tests, **place)
        keep(test_seconds=seconds, tests_passed=int(re.search(r"(\d+) passed", output)[1]))
        process, rows = subprocess.Popen(run.split(), stdout=subprocess.DEVNULL, **place), []
        while len(rows) < 4:  # header, steps 0, 5,000 and 10,000
            time.sleep(1)
            if process.poll() is not None:
                sys.exit(f"error: {run} ended by itself")
            for file in clone.glob("runs/*/eval.csv"):
                rows = file.read_text().split()
        process.terminate()
        process.wait()
        first, last = (row.split(",") for row in (rows[1], rows[3]))
        keep(untrained_return=float(first[1]), first_fit_seconds=float(last[6]))
        seconds, output = timed(learn, **place)
        returns = [float(x) for x in re.findall(r"return +(\S+)", output)]
        keep(learn_seconds=seconds, learn_first=returns[0], learn_best=max(returns))


if __name__ == "__main__":
    run_tool(time_commands, Options, __doc__)
