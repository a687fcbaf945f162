"""Times the README's two commands in a fresh clone and a fresh environment.

python benchmarks/time_readme.py       then: python benchmarks/report.py --write

The training command is stopped once 1,000 steps after the random ones have been timed; the figures
go to benchmarks/results/readme_commands.json. Nothing else should run meanwhile.
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

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


def timed(command: str, **kwargs) -> tuple[float, str]:
    """Runs a shell command to its end; returns seconds and standard output."""
    begin = time.perf_counter()
    done = subprocess.run(command, shell=True, text=True, stdout=subprocess.PIPE, **kwargs)
    if done.returncode != 0:
        sys.exit(f"error: {command} ended with {done.returncode}: {done.stdout[-2000:]}")
    return time.perf_counter() - begin, done.stdout


def episode_ends(run_dir: Path) -> dict[int, float]:
    """The time of day at which each training episode ended, by environment step."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    if "train/episode_return" not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.wall_time for event in events.Scalars("train/episode_return")}


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
            ends = {}
            while 11_000 not in ends and process.poll() is None:
                time.sleep(20)
                ends = episode_ends(run_dir)
            process.terminate()
            process.wait()
        if 11_000 not in ends:
            sys.exit(
                f"error: {run} ended by itself: {Path(folder, 'train.log').read_text()[-2000:]}"
            )
        rows = [line.split(",") for line in (run_dir / "eval.csv").read_text().split()]
        figures["untrained_return"] = float(rows[1][1])
        figures["random_steps_seconds"] = float(rows[3][6])  # at step 10,000
        figures["steps_per_second"] = 1000 / (ends[11_000] - ends[10_000])
        install, tests = test.split(" && ")
        timed(install, **options)
        figures["test_seconds"], output = timed(tests, **options)
        figures["tests_passed"] = int(re.search(r"(\d+) passed", output)[1])
    path = ROOT / "benchmarks" / "results" / "readme_commands.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
