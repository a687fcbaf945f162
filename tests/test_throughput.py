"""Throughput: operations counted, rates and ratios, contenders that fail, the files written."""

import itertools
import sys

import pandas as pd
import pytest
import throughput
import torch
import updates
from helpers_run import ROOT, one_error
from helpers_tools import call
from peers import ours

import mbpo_ftfl

WALKER = "dmc/walker-run"
WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from peers.serve import serve

def good():
    slow = [0.1, 0.1]
    print("a library's greeting")  # not in anybody's way
    return lambda: time.sleep(slow.pop() if slow else 0) or 5

def bad():
    raise ValueError("no luck\\nwith details")

serve(dict(good=good, bad=bad), "pytest")
"""


def layers(*sizes: int) -> list[int]:
    """Multiplications of each layer of a network, per row."""
    return [one * other for one, other in itertools.pairwise(sizes)]


@pytest.fixture(scope="module", autouse=True)
def _few_transitions():
    """Buffers of these tests are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "FILLED", 10_000)
        yield


def test_operations_of_an_update():
    """What is counted are the products of layers: forward, and for gradients of inputs and weights.

    The first layer's inputs have none, but in the critics that the actor learns from, whose own
    weights have none.
    """
    obs, action = 5, 2
    actor, critic = layers(obs, 256, 256, 2 * action), layers(obs + action, 256, 256, 1)
    targets = sum(actor) + 2 * sum(critic)
    critics = 2 * (2 * sum(critic) + sum(critic[1:]))
    policy = 2 * sum(actor) + sum(actor[1:]) + 2 * 2 * sum(critic)
    assert ours.products("sac", obs, action)[1] == 2 * 256 * (targets + critics + policy)
    member = layers(obs + action, 200, 200, 200, 200, 2 * (obs + 1))
    shapes, flop = ours.products("model", obs, action)
    assert flop == 7 * 2 * 256 * (3 * sum(member) - member[0])
    assert shapes[:2] == [((7, 256, 7), (7, 7, 200)), ((7, 256, 200), (7, 200, 200))]
    assert len(shapes) == 5 + 5 + 4
    assert ours.ceiling([((2, 3), (3, 4)), ((2, 3, 4), (2, 4, 5))], "cpu")() == 1


@pytest.mark.parametrize("seeds", [(), (3,)])
def test_what_is_driven_learns(seeds):
    """Every learner is updated as often as is said, in place, each with batches of its own."""
    states = []

    def build(function):
        in_place = torch.vmap(function) if seeds else function

        def update(state, *inputs):
            states.append(state)
            return mbpo_ftfl.in_place(in_place, state, *inputs)

        return update

    work = updates.Updates(mbpo_ftfl, mbpo_ftfl.Args(), (5, 2), "cpu", build, seeds, count=2)
    for once, part in ((work.sac(), "critic"), (work.model(), None)):
        assert once() == 2
        learner = states[-1][part] if part else states[-1]
        assert learner["t"].shape == seeds
        assert (learner["t"] == 2).all()
        weights = next(iter(learner["params"].values()))
        assert not seeds or not torch.equal(weights[0], weights[1])
    plain = updates.Updates(mbpo_ftfl, mbpo_ftfl.Args(), (5, 2), "cpu", build)
    once = plain.rollout(lambda function: function)
    assert once() == 400


def records(**rates: list[float]) -> list[dict]:
    """Rounds of SAC updates for each contender by name."""
    rows = []
    for who, values in rates.items():
        for number, rate in enumerate([0, *values]):
            row = {"round": number, "kind": "sac", "task": WALKER, "who": who}
            rows.append(row | {"count": rate * 2, "seconds": 2.0, "version": "9.9"})
    return rows


def line(text: str, *words: str) -> list[str]:
    """The cells of the only line of a table that has all these words."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    found = [row for row in rows if all(word in row for word in words)]
    assert len(found) == 1, text
    return found[0]


def test_ratios_are_taken_round_by_round(tmp_path):
    """From a CSV: median and range of rates, and of ours over the other's in the same round."""
    path = tmp_path / "cpu.csv"
    pd.DataFrame(records(ours=[10, 40, 60], sbx=[10, 10, 20])).to_csv(path, index=False)
    text = throughput.tables(throughput.complete(pd.read_csv(path, dtype={"version": str})))
    assert line(text, "ours")[3:] == ["40", "10 to 60", "", "", "2"]
    assert line(text, "sbx 9.9")[3:] == ["10", "10 to 20", "3", "1 to 4", "2"]


def test_share_of_the_ceiling():
    """Ours over the products alone, in percent, and their rate in GFLOP/s."""
    rows = records(ours=[30, 50], **{throughput.PRODUCTS: [100, 100]})
    rows = [row | {"gflop": 0.5} for row in rows]
    text = throughput.tables(throughput.complete(pd.DataFrame(rows)))
    name = "SAC updates, 0.50 GFLOP each, of 50 GFLOP/s that products reach"
    assert line(text, name)[2:] == ["40 %", "30 % to 50 %"]


def test_recorded_measurements_can_be_read():
    """The rates of the file that is in the repository are those of its own column."""
    frame = pd.read_csv(throughput.RESULTS / "throughput" / "cpu.csv", dtype={"version": str})
    again = throughput.complete(frame[frame.who != throughput.PARTS])
    key = ["round", *throughput.LABELS]
    rates = [table.dropna(subset="rate").set_index(key).rate for table in (frame, again)]
    pd.testing.assert_series_equal(*(rate.sort_index() for rate in rates), rtol=1e-4)
    assert "| mbpo_ftfl.py" in throughput.tables(again)


def test_steps_from_the_parts_of_mbrl_lib():
    """A step's time is the sum of its parts, at our numbers of updates; our rest is a share.

    100 steps of ours: 2,000 SAC updates and 1,000 of the ensemble, in 20 s, of which 15 in updates.
    """
    rates = {"env": 1000, "sac": 100, "model": 50, "rollout": 40_000}
    rows = [
        {"round": 1, "kind": kind, "task": WALKER, "who": "mbrl-lib", "count": rate, "seconds": 1}
        for kind, rate in rates.items()
    ]
    rows[0]["who"] = "ours"
    for kind, rate in {"sac": 2000 / 9, "model": 1000 / 6}.items():
        rows.append(rows[0] | {"kind": kind, "count": rate})
    run = {"round": 1, "kind": "steps", "task": "mbpo_ftfl.py", "who": "ours", "count": 100}
    run |= {"seconds": 20, "sac_updates": 2000, "model_updates": 1000}
    frame = throughput.complete(pd.DataFrame([run | {"round": 0, "count": 0}, *rows, run]))
    per_step = 1 / 1000 + 20 / 100 + 10 / 50 + 400 / 40_000
    found = throughput.rates(frame, "steps", "mbpo_ftfl.py", throughput.PARTS)
    assert found.to_dict() == pytest.approx({1: 1 / per_step})
    text = throughput.tables(frame)
    assert line(text, f"{throughput.PARTS}")[5] == f"{5 * per_step:.3g}"
    share = line(text, "time of a step besides SAC and model updates")
    assert share[2:] == ["25 %", "25 % to 25 %"]


def test_a_round_with_contenders_that_fail(tmp_path, monkeypatch):
    """A task that fails, a process that ends: each is a line; ours goes on."""
    script = tmp_path / "contender.py"
    script.write_text(WORKER.format(folder=str(ROOT / "benchmarks")))

    def plan(options, folder, workers):
        commands = {"whole": [script], "dead": ["-c", "raise SystemExit('no such library')"]}
        for name, words in commands.items():
            workers[name] = throughput.Worker([sys.executable, *words], folder / f"{name}.log")
        labels = {"kind": "sac", "task": WALKER}
        turns = [("whole", "good", "ours"), ("whole", "bad", "bad"), ("dead", "good", "dead")]
        return [(workers[who], task, labels | {"who": as_}) for who, task, as_ in turns]

    monkeypatch.setattr(throughput, "plan", plan)
    monkeypatch.setattr(throughput.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(throughput.os, "environ", dict(throughput.os.environ))
    words = ["--rounds", "2", "--seconds", "0.01", "--threads", "1", "--device", "cpu"]
    code, out, err = call(throughput.measure, throughput.Options, *words, "--out", tmp_path)
    assert code == 0, err
    frame, text = pd.read_csv(tmp_path / "cpu.csv"), (tmp_path / "cpu.md").read_text()
    assert text in out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert frame["round"].tolist() == [n for n in (0, 1, 2) for _ in range(3)]
    assert frame.who.tolist() == ["ours", "bad", "dead"] * 3
    mine = frame[(frame.who == "ours") & (frame["round"] > 0)]
    assert (mine["count"] % 5 == 0).all()
    assert (mine["count"] > 0).all()
    assert (mine.seconds >= 0.01).all()
    assert frame.seconds[0] >= 0.2  # the first two calls
    for who, reason in {
        "bad": "ValueError('no luck\\nwith details')",
        "dead": "no such library",
    }.items():
        assert reason in line(text, who)
        assert frame[frame.who == who].rate.isna().all()


def test_steps_of_a_whole_run(monkeypatch):
    """Turns are whole periods after the random steps, each with a fit, and tell their updates."""
    monkeypatch.setattr(updates, "FIT_EVERY", 2)
    monkeypatch.setattr(ours, "FIT_EVERY", 2)
    script, answers = ours.load_script("mbpo_ftfl.py"), []
    small = {"learning_starts": 50, "updates_per_step": 4, "compile": False, "buffer_size": 1000}
    small |= {"ensemble_size": 2, "num_elites": 1, "model_hidden": 8, "batch_size": 32}
    args = script.Args
    monkeypatch.setattr(script, "Args", lambda **given: args(**given, **small))
    requests = iter([{}, {"seconds": 0.001}, {"seconds": 0.001}])
    monkeypatch.setattr(ours, "channel", lambda: (requests, lambda **a: answers.append(a)))
    with pytest.raises(SystemExit):
        ours.serve_steps("mbpo_ftfl", "InvertedPendulum-v5", "cpu")
    assert [answer["count"] for answer in answers] == [0, 2, 2]
    assert [answer["sac_updates"] for answer in answers] == [0, 8, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "x"], "'x'"),
        (["--only", "speed"], "'speed'"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--device", "cuda"], "--device cuda: there is none here"),
    ],
)
def test_bad_input_is_one_line(words, said, monkeypatch):
    """Exit code 2, and a line that says what is wrong."""
    monkeypatch.setattr(throughput, "plan", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(throughput.measure, throughput.Options, *words)
    assert code == 2
    assert said in one_error(err)
