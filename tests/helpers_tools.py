"""How the tests of benchmarks/ call a tool in this process, and compare runs."""

import io
import signal
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from common import run_tool
from helpers_run import read_checkpoint, read_evaluations, same


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
    return code or 0, out.getvalue(), err.getvalue()


def assert_equal_runs(one: Path, other: Path) -> None:
    """Evaluations and all of the checkpoint are equal to the bit, but for seconds and settings."""
    assert read_evaluations(one) == read_evaluations(other)
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert all(ours["progress"][x] == theirs["progress"][x] for x in ("step", "episode"))
    for part in (ours.keys() | theirs.keys()) - {"settings", "progress"}:
        assert same(ours[part], theirs[part]), part
