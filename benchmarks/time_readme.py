"""Times the README's two commands in a fresh clone and a fresh environment.

python benchmarks/time_readme.py                  both; then: python benchmarks/report.py --write
python benchmarks/time_readme.py --skip-tests     the first alone

The training command is stopped after the evaluation at step 10,000, which follows the random steps
and the first fit; the figures go to benchmarks/results/readme_commands.json.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def timed(command: str, **kwargs) -> tuple[float, str]:
    """Runs a shell command to its end; returns seconds and standard output."""
    begin = time.perf_counter()
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, **kwargs)
    if done.returncode != 0:
        sys.exit(f"error: {command} ended with {done.returncode}: {done.stdout[-2000:]}")
    return time.perf_counter() - begin, done.stdout


def main() -> None:
    """Times both commands and writes the figures."""
    blocks = re.findall(r"```bash\n(pip install .*)\n```", (ROOT / "README.md").read_text())
    train, test = blocks[:2]
    figures = {"cores": os.cpu_count(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        timed(f"git clone --quiet {ROOT} {clone} && {sys.executable} -m venv {folder}/venv")
        environment = os.environ | {"PATH": f"{folder}/venv/bin:{os.environ['PATH']}"}
        options = {"cwd": clone, "env": environment}
        install, run = train.split(" && ")
        figures["install_seconds"], _ = timed(install, **options)
        with open(Path(folder, "train.log"), "w") as log:
            process = subprocess.Popen(shlex.split(run), stdout=log, stderr=log, **options)
            run_dir = clone / "runs" / "dmc-walker-run__mbpo_ftfl__3"
            rows = []
            while len(rows) < 4 and process.poll() is None:  # header, steps 0, 5,000 and 10,000
                time.sleep(1)
                if (run_dir / "eval.csv").exists():
                    rows = (run_dir / "eval.csv").read_text().split()
            process.terminate()
            process.wait()
        if len(rows) < 4:
            said = Path(folder, "train.log").read_text()[-2000:]
            sys.exit(f"error: {run} ended by itself: {said}")
        figures["untrained_return"] = float(rows[1].split(",")[1])
        figures["first_fit_seconds"] = float(rows[3].split(",")[6])
        if "--skip-tests" not in sys.argv[1:]:
            install, tests = test.split(" && ")
            timed(install, **options)
            figures["test_seconds"], output = timed(tests, **options)
            figures["tests_passed"] = int(re.search(r"(\d+) passed", output)[1])
    path = ROOT / "benchmarks" / "results" / "readme_commands.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
