"""How the tests of benchmarks/ call a tool in this process, and compare runs."""

import io
import signal
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from common import run_tool
from helpers_run import listing, one_error, read_checkpoint, read_evaluations, same_learning


def call(do, options: type, *words, **how) -> tuple[int, str, str]:
    """Does what a command line says; returns exit code, stdout and stderr."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        try:
            run_tool(do, options, "", [*map(str, words)], **how)
        except SystemExit as ending:
            code = ending.code
    signal.signal(signal.SIGTERM, handler)
    return int(code or 0), out.getvalue(), err.getvalue()


def assert_equal_runs(one: Path, other: Path) -> None:
    """Evaluations and all of the checkpoint are equal to the bit, but for seconds and settings."""
    assert read_evaluations(one) == read_evaluations(other)
    assert same_learning(read_checkpoint(one), read_checkpoint(other))


def refusal(folder: Path, do, options: type, *words, **how) -> str:
    """The one line on bad input, which has exit code 2 and writes nothing into a folder."""
    before = listing(folder)
    code, out, err = call(do, options, *words, **how)
    assert (code, out) == (2, "")
    assert listing(folder) == before
    return one_error(err)
