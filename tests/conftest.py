"""One thread for tests and their children, the scripts on the path, and a way to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in children
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def pytest_collection_modifyitems(items) -> None:
    """The tests that take minutes go first, so that no process is left alone with them."""
    items.sort(key=lambda item: item.path.stem != "test_learning")


@pytest.fixture
def run():
    """Runs a script as a child to its end; returns its exit code, stdout and stderr."""

    def run_script(script: str, *words: str, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / f"{script}.py", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return run_script
