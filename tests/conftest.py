"""One thread for tests and their children, fixed random numbers, and ways to call a script."""

import os
import signal
import sys
import warnings

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, here and in children
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
import torch
from helpers_run import listing, one_error


def pytest_collection_modifyitems(items) -> None:
    """The tests that take minutes go first, so that no process is left alone with them."""
    items.sort(key=lambda item: item.path.stem != "test_learning")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers of torch in every run."""
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Numbers in float64, so that a reference may be compared to some ten digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Calls a script's main in-process, run root in tmp_path; returns exit code, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for module, name in ((warnings, "showwarning"), (sys, "unraisablehook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end

    def call(script, words: list[str]) -> tuple[int, str, str]:
        if "--run-root" not in words:
            words = [*words, "--run-root", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        for number in handlers:  # as a terminal has them; workers of pytest may ignore Ctrl-C
            signal.signal(number, signal.SIG_DFL)
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as ending:
            code = ending.code
        return code, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def done(main):
    """Checks that main ends well, without a word on stderr; returns stdout."""

    def call(script, words: list[str]) -> str:
        code, out, err = main(script, words)
        assert (code, err) == (0, "")
        return out

    return call


@pytest.fixture
def refused(main, tmp_path):
    """Checks that main ends with exit code 2, one line, and nothing written; returns the line."""

    def call(script, words: list[str]) -> str:
        before = listing(tmp_path)
        code, out, err = main(script, words)
        assert (code, out) == (2, ""), err
        assert listing(tmp_path) == before
        return one_error(err)

    return call
