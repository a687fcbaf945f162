"""benchmarks/throughput.py: what a call does, who is measured, contenders that fail."""

from collections import Counter

import pandas as pd
import pytest
import throughput
from helpers_run import one_error
from helpers_tools import call

import mbpo_ftfl


@pytest.mark.parametrize("kind", throughput.KINDS)
def test_a_call_does_as_much_as_is_counted(kind, monkeypatch):
    """Updates are called as often, and rollouts add as many transitions, as the rate is made of."""
    calls = Counter()

    def compiled(update, _):
        return lambda *given: calls.update([update.__name__])

    def rollout(model, actor, starts, horizon, *_):
        calls["rollout"] += horizon * len(starts.obs)
        return starts.obs.new_zeros(5, 24 + 6 + 1 + 24 + 1)

    monkeypatch.setattr(mbpo_ftfl, "compiled_update", compiled)
    monkeypatch.setattr(mbpo_ftfl, "rollout", rollout)
    _, amount, once = throughput.ours("ours, exact", kind, "cpu")
    calls.clear()
    once()
    assert calls == {{"sac": "sac_update", "model": "model_update"}.get(kind, kind): amount}


def test_who_is_measured():
    """Ours first, exact and fast, then the peers that can do it."""
    options = throughput.Options(only=("sac", "model"), peers=("sbx", "mbrl-lib"))
    ours = ["ours, exact", "ours, fast"]
    expected = [(who, "sac") for who in [*ours, "sbx", "mbrl-lib"]]
    assert throughput.plan(options) == expected + [(who, "model") for who in [*ours, "mbrl-lib"]]


def test_contenders_are_processes_that_may_fail(tmp_path, monkeypatch):
    """All have a turn in every round; one without its library is a line that says so."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, time\nsys.path.append({throughput.__file__.rpartition('/')[0]!r})\n"
        "import throughput\n"
        "throughput.stable = lambda *turn: ('pytest', 5, lambda: time.sleep(0.01))\n"
        "def absent(*turn): raise ImportError('no such library')\n"
        "throughput.mbrl_lib = absent\nthroughput.contend(*throughput.json.loads(sys.argv[2]))\n"
    )
    turns = [("sbx", "sac"), ("mbrl-lib", "sac")]
    monkeypatch.setattr(throughput, "plan", lambda _: turns)
    monkeypatch.setattr(throughput, "__file__", str(program))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--rounds", "2", "--seconds", "0.1", "--threads", "1", "--device", "cpu"]
    code, out, err = call(throughput.measure, throughput.Options, *words, "--out", tmp_path)
    assert code == 0, err
    assert (tmp_path / "cpu.md").read_text() in out
    frame = pd.read_csv(tmp_path / "cpu.csv")
    assert [*frame["round"]] == [0, 0, 1, 1]
    assert frame.rate[::2].between(50, 500).all()
    assert {*frame.error[1::2]} == {"ImportError: no such library"}
    assert frame.rate[1::2].isna().all()
    assert f" {frame.rate[::2].max():.0f}" in out  # the largest of the rounds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "speed"], "speed"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_bad_input_is_one_line(words, said, monkeypatch):
    """Exit code 2, and a line that says what is wrong, before anything is started."""
    monkeypatch.setattr(throughput.subprocess, "run", lambda *_: pytest.fail("it was started"))
    code, _, err = call(throughput.measure, throughput.Options, *words)
    assert code == 2
    assert said in one_error(err)
