"""Runs the README's three commands in a fresh clone and environment, and writes what they take.

    python benchmarks/time_readme.py && python benchmarks/report.py --write

The first ends at step 10,000, after the first fit. Writes results/readme_commands.md.
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import tyro
from common import RESULTS, ROOT


def timed(command: str, **place) -> tuple[str, str]:
    """Runs a shell command to its end; returns its minutes, with the unit, and standard output."""
    begin = time.perf_counter()
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, **place)
    if done.returncode != 0:
        sys.exit(f"error: {command} ended with {done.returncode}: {done.stdout[-2000:]}")
    return f"{(time.perf_counter() - begin) / 60:.0f} min", done.stdout


def main() -> None:
    """Times the commands, the tests first."""
    text = (ROOT / "README.md").read_text()
    (install, run), (install_tests, tests) = re.findall(r"(?m)^(pip install .*) && (.*)$", text)
    (learn,) = re.findall(r"^(python [^`]*Pendulum[^`]*)```", text, flags=re.M)
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        timed(f"git clone --quiet {ROOT} {clone} && {sys.executable} -m venv {folder}/venv")
        path = {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
        place = {"cwd": clone, "env": os.environ | path}
        installed, _ = timed(install, **place)
        timed(install_tests, **place)
        tested, output = timed(tests, **place)
        passed = re.search(r"(\d+) passed", output)[1]
        ran, first = timed(f"{run} --total-timesteps 10000", **place)
        learned, output = timed(learn, **place)
    untrained = float(re.search(r"return +(\S+)", first)[1])
    returns = [float(x) for x in re.findall(r"return +(\S+)", output)]
    said = f"""On {os.cpu_count()} CPU cores: The first command installs in {installed}, prints a
return of {untrained:.0f} for the untrained policy, and reaches step 10,000, after the first fit, in
{ran}; all 500,000 steps are a job for a GPU, or for about a day. The second runs
{passed} tests in {tested}; in them each script must learn a real task. In the third, of {learned},
the return rises from {returns[0]:.0f} to {max(returns):.0f}; 1,000 is a pole that never falls."""
    (RESULTS / "readme_commands.md").write_text(textwrap.fill(said, 118) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
