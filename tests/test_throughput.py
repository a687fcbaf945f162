"""benchmarks/throughput.py: what a call does, rates and ratios, contenders that fail."""

from collections import Counter

import pandas as pd
import pytest
import throughput
from helpers_run import one_error
from helpers_tools import call

import mbpo_ftfl

WALKER = "dmc/walker-run"


@pytest.mark.parametrize("kind", throughput.KINDS)
def test_a_call_does_as_much_as_is_counted(kind, monkeypatch):
    """Updates are called as often, and rollouts add as many transitions, as the rate is made of."""
    calls = Counter()

    def compiled(update, _):
        return lambda *given: calls.update([update.__name__])

    def rollout(model, actor, starts, horizon, *_):
        calls["rollout"] += horizon * len(starts.obs)
        return starts.obs.new_zeros(5, 3 + 1 + 1 + 3 + 1)

    monkeypatch.setattr(mbpo_ftfl, "compiled_update", compiled)
    monkeypatch.setattr(mbpo_ftfl, "rollout", rollout)
    _, amount, once = throughput.ours("ours, exact", kind, 3, 1, "cpu")
    calls.clear()
    once()
    assert calls == {{"sac": "sac_update", "model": "model_update"}.get(kind, kind): amount}


def test_who_is_measured():
    """Ours first, exact and fast, then the peers that can do it, at every size."""
    options = throughput.Options(only=("sac", "model"), peers=("sbx", "mbrl-lib"))
    ours, tasks = ["ours, exact", "ours, fast"], throughput.SIZES
    expected = [(who, "sac", task) for task in tasks for who in [*ours, "sbx", "mbrl-lib"]]
    expected += [(who, "model", task) for task in tasks for who in [*ours, "mbrl-lib"]]
    assert throughput.plan(options) == expected


def test_ratios_are_taken_round_by_round(tmp_path):
    """Median and range of rates, and of the first one's over each in the same round; errors."""
    rates = {"ours": [10, 40, 60], "sbx": [20, 10, 20], "mbrl-lib": [float("nan")] * 3}
    records = [
        {"round": n, "kind": "sac", "task": WALKER, "who": who, "version": "", "rate": rate}
        | {"error": "" if rate == rate else "not here"}
        for who, values in rates.items()
        for n, rate in enumerate(values, 1)
    ]
    text = throughput.write(records, tmp_path / "a.csv")
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in text.splitlines()]
    assert lines[0][5:8] == ["ours over it", "its min", "its max"]
    assert lines[2] == ["ours", "", "40", "10", "60", "1", "1", "1", ""]
    assert lines[3] == ["sbx", "", "20", "10", "20", "3", "0.5", "4", ""]
    assert lines[4] == ["mbrl-lib", *[""] * 7, "not here"]


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
    turns = [("sbx", "sac", WALKER), ("mbrl-lib", "sac", WALKER)]
    monkeypatch.setattr(throughput, "plan", lambda _: turns)
    monkeypatch.setattr(throughput, "__file__", str(program))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--rounds", "2", "--seconds", "0.1", "--threads", "1", "--device", "cpu"]
    code, out, err = call(throughput.measure, throughput.Options, *words, "--out", tmp_path)
    assert code == 0, err
    assert (tmp_path / "cpu.md").read_text() in out
    frame = pd.read_csv(tmp_path / "cpu.csv")
    assert [*frame["round"]] == [1, 1, 2, 2]
    assert frame.rate[::2].between(50, 500).all()
    assert {*frame.error[1::2]} == {"ImportError: no such library"}
    assert frame.rate[1::2].isna().all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "speed"], "speed"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--rounds", "0"], "--rounds"),
        (["--pythons", "pets", "python"], "--pythons"),
    ],
)
def test_bad_input_is_one_line(words, said, monkeypatch):
    """Exit code 2, and a line that says what is wrong, before anything is started."""
    monkeypatch.setattr(throughput, "Contender", lambda *_: pytest.fail("it was started"))
    code, _, err = call(throughput.measure, throughput.Options, *words)
    assert code == 2
    assert said in one_error(err)
