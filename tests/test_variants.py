"""The tool that measures variants refuses what it can't measure."""

import subprocess
import sys

import pytest
from helpers_run import ROOT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--seconds", "nan"], "--seconds must be above 0 and under 3600"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "tpu"], "--device must be one that is here (cpu"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, said, tmp_path):
    """It ends with 2, and what was measured before stays."""
    command = [sys.executable, ROOT / "benchmarks" / "variants.py", *words, "--out", tmp_path]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 2
    assert child.stderr.startswith(f"error: {said}")
    assert child.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
