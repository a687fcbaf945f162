"""Throughput: what a turn does, how variants differ, rates and ratios, contenders that fail."""

from collections import Counter
from functools import partial, wraps
from types import SimpleNamespace

import pandas as pd
import pytest
import throughput
import torch
from helpers_run import one_error
from helpers_tools import call
from peers import ours

WALKER = "dmc/walker-run"
SMALL = {"learning_starts": 50, "batch_size": 32, "buffer_size": 1000}
SMALL_MODEL = {"ensemble_size": 2, "num_elites": 1, "model_hidden": 8}
START = "from peers.serve import serve, start\nstart()\n"
FAKES = {
    "good": START + "import time; print('hello'); serve('pytest', 5, lambda: time.sleep(0.01))",
    "bad": START + "serve('pytest', 5, lambda: 1 / 0)",
    "absent": "raise SystemExit('no such library')",
}


def one_turn(kind: str, name: str, who: str = "ours", **settings) -> tuple[int, Counter, set]:
    """A run of ours with one turn: what this is said to do, what it calls, how the run was set up.

    Nothing is compiled; what would be is among the facts.
    """
    script, calls, facts, said = ours.load_script(f"{name}.py"), Counter(), set(), []
    args, small = script.Args, SMALL | (SMALL_MODEL if name != "sac" else {}) | settings

    def counted(function):
        @wraps(function)
        def spy(*given, **how):
            calls[function.__name__] += 1
            return function(*given, **how)

        return spy

    def setup_torch(args, _):
        torch.set_float32_matmul_precision("medium")
        facts.add("enabled" if args.compile else "disabled")
        return lambda function, **_: facts.add(function.func.__name__) or function

    def serve(_, amount: int, once) -> None:
        before = calls.copy()
        once()
        said.extend([amount, calls - before])

    with pytest.MonkeyPatch.context() as patch:
        for known in ("check_finite", "sac_update", "model_update", "rollout", "Critic"):
            if hasattr(script, known):
                patch.setattr(script, known, counted(getattr(script, known)))
        patch.setattr(script, "mlp", partial(script.mlp, hidden=8))
        patch.setattr(script, "setup_torch", setup_torch)
        patch.setattr(script, "Args", lambda **given: args(**given | small))
        patch.setattr(torch, "set_float32_matmul_precision", facts.add)
        patch.setattr(torch._dynamo, "mark_static_address", lambda _: facts.add("marked"))
        patch.setattr(ours, "serve", serve)
        patch.setitem(ours.RUNS["model"][1], "learning_starts", 50)
        task = {"kind": kind, "task": f"{name}.py", "who": who, "env_id": "InvertedPendulum-v5"}
        with pytest.raises(SystemExit):
            ours.run(SimpleNamespace(**task, device="cpu", obs=4, action=1))
    return *said, facts | ({"twins"} if calls["Critic"] else set())


def test_a_turn_does_as_much_as_is_counted():
    """Updates, transitions, or steps of four updates; a turn's steps have one fit."""
    amount, calls, _ = one_turn("sac", "sac")
    assert amount == calls["sac_update"]
    amount, calls, _ = one_turn("model", "mbpo_ftfl")
    assert amount == calls["model_update"]
    amount, calls, _ = one_turn("rollout", "mbpo_ftfl", rollouts_per_step=400)
    assert amount == 400 * calls["rollout"] == 400
    amount, calls, _ = one_turn("steps", "mbpo_ftfl", updates_per_step=4)
    assert calls["sac_update"] == 4 * amount
    assert calls["model_update"] == throughput.FIT_UPDATES


def test_variants_differ_in_one_thing(monkeypatch):
    """What is compiled, and how."""
    monkeypatch.setitem(ours.RUNS, "sac", ("sac.py", {"updates_per_step": 5}, 1, 5))
    shipped = {"medium", "enabled", "in_place", "marked", "twins"}
    expected = {
        ours.DEFAULT: shipped - {"medium"},
        ours.UNMARKED: shipped - {"marked"},
        ours.BESIDE: shipped - {"in_place"} | {"sac_update"},
        ours.UNCOMPILED: shipped - {"enabled"} | {"disabled"},
    }
    for variant in ours.VARIANTS:
        amount, calls, facts = one_turn("sac", "sac", variant)
        assert amount == calls["sac_update"] == 5
        assert facts == expected.get(variant, shipped), variant


def test_ratios_are_taken_round_by_round():
    """Median and range of rates, and of the first one's over each in the same round; errors."""
    rates = {"ours": [10, 40, 60], "sbx": [20, 10, 20], "mbrl-lib": [None] * 3}
    rows = [
        {"round": number, "kind": "sac", "task": WALKER, "who": who, "rate": rate}
        for who, values in rates.items()
        for number, rate in enumerate(values, 1)
    ]
    rows[-1]["error"] = "not here"
    text = throughput.table(pd.DataFrame(rows).reindex(columns=throughput.COLUMNS))
    lines = [[cell.strip() for cell in line.split("|")[3:-1]] for line in text.splitlines()]
    assert lines[0][4:] == ["ours over it", "its min", "its max", "error"]
    assert lines[2] == ["ours", "40", "10", "60", "1", "1", "1", ""]
    assert lines[3] == ["sbx", "20", "10", "20", "3", "0.5", "4", ""]
    assert lines[4] == ["mbrl-lib", *[""] * 6, "not here"]


def test_who_is_measured():
    """Ours first, then the peers that can do it; variants of updates alone, at one size."""

    def planned(**given) -> list[tuple]:
        turns = throughput.plan(throughput.Options(**given))
        return [(turn["kind"], turn["task"], turn["who"]) for turn in turns]

    sizes = [WALKER, "dmc/humanoid-walk"]
    assert planned(only=("model",)) == [
        ("model", task, who) for task in sizes for who in ("ours", "mbrl-lib")
    ]
    assert planned(only=("sac",), peers=("sbx",))[:2] == [
        ("sac", WALKER, "ours"),
        ("sac", WALKER, "sbx"),
    ]
    assert [who for *_, who in planned(only=("steps",))] == ["ours"] * 4
    turns = planned(variants=True)
    for wanted in ("sac", "model"):
        assert [who for kind, _, who in turns if kind == wanted] == ours.VARIANTS
    assert {kind for kind, *_ in turns} == {"sac", "model"}


@pytest.mark.parametrize("names", [["good", "bad", "absent"], ["absent"]])
def test_contenders_that_fail(names, tmp_path, monkeypatch):
    """A call that fails, a process that ends, a Python without the library: each is a line."""
    (tmp_path / "peers").mkdir()
    for name in names:
        (tmp_path / "peers" / f"{name}.py").write_text(FAKES[name])
    turns = [{"kind": "sac", "task": WALKER, "who": name} for name in names]
    monkeypatch.setattr(throughput, "MODULES", {name: name for name in names})
    monkeypatch.setattr(throughput, "plan", lambda _: turns)
    monkeypatch.setattr(throughput.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--rounds", "2", "--seconds", "0.1", "--threads", "1", "--device", "cpu"]
    code, out, err = call(throughput.measure, throughput.Options, *words, "--out", tmp_path)
    assert code == 0, err
    assert (tmp_path / "cpu.md").read_text() in out
    frame = pd.read_csv(tmp_path / "cpu.csv")
    assert [*zip(frame["round"], frame.who, strict=True)] == [(i, x) for i in (1, 2) for x in names]
    rates, errors = frame.set_index("who").rate, frame.set_index("who").error
    if "good" in names:
        assert rates["good"].between(100, 500).all()
        assert set(errors["bad"]) == {"ZeroDivisionError: division by zero"}
    assert set(errors["absent"]) == {"no such library"}
    assert rates.drop("good", errors="ignore").isna().all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "x"], "'x'"),
        (["--only", "speed"], "speed"),
        (["--device", "tpu"], "tpu"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--rounds", "0"], "--rounds"),
        (["--variants", "--only", "steps"], "--variants"),
        (["--pythons", "pets", "python"], "--pythons"),
    ],
)
def test_bad_input_is_one_line(words, said, monkeypatch):
    """Exit code 2, and a line that says what is wrong, before anything is started."""
    monkeypatch.setattr(throughput, "Contender", lambda *_: pytest.fail("it was started"))
    code, _, err = call(throughput.measure, throughput.Options, *words)
    assert code == 2
    assert said in one_error(err)
