"""One thread for tests and their children, the scripts on the path, and ways to run a script."""

import os
import signal
import subprocess
import sys
import warnings
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


def contents(folder: Path) -> dict:
    """Every path below a folder, with the bytes of the files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Calls a script's main in-process, run root in tmp_path; returns exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    for module, name in ((warnings, "showwarning"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end

    def call(script, words: list[str]) -> tuple[int, str, str]:
        if "--run-root" not in words:
            words = [*words, "--run-root", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as ending:
            code = ending.code
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(main, tmp_path):
    """Checks that main ends with exit code 2, one line, and nothing written; returns the line."""

    def call(script, words: list[str]) -> str:
        before = contents(tmp_path)
        code, out, err = main(script, words)
        assert code == 2, err
        assert out == ""
        assert contents(tmp_path) == before
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return call
