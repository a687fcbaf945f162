"""benchmarks/throughput.py: what a call does, who is measured, contenders that fail."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import throughput
from helpers_tools import call, refusal

import mbpo_ftfl

TOOL = throughput.measure, throughput.Options


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
    amount, once = throughput.ours("ours, exact", kind, "cpu")
    calls.clear()
    once()
    assert calls == {{"sac": "sac_update", "model": "model_update"}.get(kind, kind): amount}


def test_who_is_measured_and_what_is_written(tmp_path, monkeypatch):
    """In every round all who can have a turn; one that fails is a line that says why."""

    def turn(who: str, *_) -> dict:
        if who == "mbrl-lib":
            raise ImportError("no such library\nat all")
        return {"version": "1.2", "rate": next(rates), "error": ""}

    rates = iter([5, 1, 1, 1, 1, 700, 1, 1, 1, 1, 60, 1, 1, 1, 1])
    monkeypatch.setattr(throughput, "take_turn", turn)
    monkeypatch.setattr(throughput, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "--rounds 3 --only sac model --peers sbx mbrl-lib --device cpu --out"
    code, out, err = call(*TOOL, *words.split(), tmp_path)
    assert code == 0, err
    frame = pd.read_csv(tmp_path / "cpu.csv")
    who = ["ours, exact", "ours, fast", "sbx", "mbrl-lib", "ours, exact", "ours, fast", "mbrl-lib"]
    assert [*frame.who] == 3 * who
    assert [*frame.kind] == 3 * (4 * ["sac"] + 3 * ["model"])
    absent = frame.who == "mbrl-lib"
    assert {*frame.error[absent]} == {"ImportError: no such library"}
    row = next(line for line in out.splitlines() if line.startswith("| SAC updates"))
    assert [word.strip() for word in row.split("|")][3:7] == ["1.2", "60", "5", "700"]


def end_or_tell(who: str, *_) -> dict:
    """A turn that tells which process it has, or one that ends it."""
    return (
        {"version": "1", "rate": os.getpid(), "error": ""} if who == "ours, exact" else os._exit(3)
    )


def test_a_turn_is_a_process_that_may_die(tmp_path, monkeypatch):
    """It is another one than this, with the threads that were asked for; the next has its own."""
    monkeypatch.setattr(throughput, "take_turn", end_or_tell)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = "--rounds 1 --only rollout --threads 2 --device cpu --peers --out"
    code, _, err = call(*TOOL, *words.split(), tmp_path)
    assert code == 0, err
    first, second = pd.read_csv(tmp_path / "cpu.csv").astype(object).fillna("").itertuples()
    assert first.rate not in ("", os.getpid())
    assert (second.rate, second.error.split(":")[0]) == ("", "BrokenProcessPool")
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("words", "said"), [("--only speed", "speed"), ("--rounds 0", "--rounds")])
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch):
    """Exit code 2, and a line that says what is wrong, before anything is started."""
    monkeypatch.setattr(throughput, "ProcessPoolExecutor", lambda *_: pytest.fail("it was started"))
    words = [*words.split(), "--out", tmp_path / "out"]
    assert said in refusal(tmp_path, *TOOL, *words)
