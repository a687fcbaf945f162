"""Throughput: operations counted, rates and ratios, contenders that fail, the files written."""

import itertools
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from helpers_run import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput

import ours  # isort: skip  # throughput has put its folder on the path

WALKER = "dmc/walker-run"
WORKER = """
import sys, time
sys.path.insert(0, {folder!r})
from serve import serve

print("a library's greeting")  # not in anybody's way

def good():
    slow = [0.1, 0.1]
    return lambda: time.sleep(slow.pop() if slow else 0) or 5

def bad():
    raise ValueError("no luck\\nwith details")

serve(dict(good=good, bad=bad), "pytest")
"""


@dataclass
class Small(ours.script.Args):
    """Defaults that take little time."""

    learning_starts: int = 50
    updates_per_step: int = 4
    buffer_size: int = 1000


def layers(*sizes: int) -> list[int]:
    """Multiplications of each layer of a network, per row."""
    return [one * other for one, other in itertools.pairwise(sizes)]


@pytest.mark.parametrize(("obs", "action"), [(24, 6), (5, 2)])
def test_operations_of_an_update(obs, action):
    """What is counted are the products of layers: forward, and for gradients of inputs and weights.

    The first layer's inputs have none, but in the critics that the actor learns from, whose own
    weights have none.
    """
    actor, critic = layers(obs, 256, 256, 2 * action), layers(obs + action, 256, 256, 1)
    targets = sum(actor) + 2 * sum(critic)
    critics = 2 * (2 * sum(critic) + sum(critic[1:]))
    policy = 2 * sum(actor) + sum(actor[1:]) + 2 * 2 * sum(critic)
    assert ours.products("sac", obs, action)[1] == 2 * 256 * (targets + critics + policy)
    member = layers(obs + action, 200, 200, 200, 200, 2 * (obs + 1))
    assert ours.products("model", obs, action)[1] == 7 * 2 * 256 * (3 * sum(member) - member[0])


def test_the_products_alone_are_those_of_the_update():
    """The ceiling multiplies matrices of the shapes taken down, all of them."""
    shapes, _ = ours.products("model", 5, 2)
    assert shapes[:2] == [((7, 256, 7), (7, 7, 200)), ((7, 256, 200), (7, 200, 200))]
    assert len(shapes) == 5 + 5 + 4
    assert ours.ceiling([((2, 3), (3, 4)), ((2, 3, 4), (2, 4, 5))], "cpu")() == 1


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
    found = [row for row in text.splitlines() if all(f"| {word} |" in row for word in words)]
    assert len(found) == 1, text
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def test_ratios_are_taken_round_by_round(tmp_path):
    """From a CSV: median and range of rates, and of ours over the other's in the same round."""
    path = tmp_path / "cpu.csv"
    pd.DataFrame(records(ours=[10, 40, 60], sbx=[10, 10, 20])).to_csv(path, index=False)
    text = throughput.tables(throughput.complete(pd.read_csv(path)))
    assert line(text, "ours")[3:] == ["40", "10 to 60", "", "", "2"]
    assert line(text, "sbx 9.9")[3:] == ["10", "10 to 20", "3", "1 to 4", "2"]


def test_share_of_the_ceiling():
    """Ours over the products alone, in percent, and their rate in GFLOP/s."""
    rows = records(ours=[30, 50], **{throughput.PRODUCTS: [100, 100]})
    rows = [row | {"gflop": 0.5} for row in rows]
    text = throughput.tables(throughput.complete(pd.DataFrame(rows)))
    name = "SAC updates, 0.50 GFLOP each, of 50 GFLOP/s that products reach"
    assert line(text, name)[2:] == ["40 %", "30 % to 50 %"]


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
    run = {"round": 1, "kind": "steps", "task": "mbpo_ftfl.py", "who": "ours", "count": 100}
    run |= {"seconds": 20, "sac_updates": 2000, "sac_seconds": 9, "model_updates": 1000}
    start = run | {"round": 0, "count": 0, "sac_seconds": 1, "model_seconds": 1, "fit_seconds": 1}
    frame = throughput.complete(
        pd.DataFrame([start, *rows, run | {"model_seconds": 6, "fit_seconds": 9}])
    )
    per_step = 1 / 1000 + 20 / 100 + 10 / 50 + 400 / 40_000
    found = throughput.rates(frame, "steps", "mbpo_ftfl.py", throughput.PARTS)
    assert found.to_dict() == pytest.approx({1: 1 / per_step})
    text = throughput.tables(frame)
    assert line(text, throughput.PARTS)[5] == f"{5 * per_step:.3g}"
    share = line(text, "time of a step besides SAC and model updates")
    assert share[2:] == ["25 %", "25 % to 25 %"]
    share = line(text, "time of a step besides SAC updates and fits")
    assert share[2:] == ["10 %", "10 % to 10 %"]


@pytest.fixture
def script(tmp_path) -> Path:
    """A contender of which one task works."""
    path = tmp_path / "contender.py"
    path.write_text(WORKER.format(folder=str(ROOT / "benchmarks" / "peers")))
    return path


def test_a_round_with_contenders_that_fail(tmp_path, script, monkeypatch, capsys):
    """A task that fails, a process that ends, one not installed: each is a line; ours goes on."""

    def plan(args, folder, workers):
        commands = {"whole": [script], "dead": ["-c", "raise SystemExit('no such library')"]}
        for name, words in commands.items():
            workers[name] = throughput.Worker([sys.executable, *words], folder / f"{name}.log")
        workers["absent"] = throughput.Worker([], folder / "none.log", "not installed: why")
        labels = {"kind": "sac", "task": WALKER}
        turns = [("whole", "good", "ours"), ("whole", "bad", "bad"), ("dead", "good", "dead")]
        turns.append(("absent", "good", "absent"))
        return [(workers[who], task, labels | {"who": as_}) for who, task, as_ in turns]

    monkeypatch.setattr(throughput, "plan", plan)
    words = ["--rounds", "2", "--seconds", "0.01", "--threads", "1", "--device", "cpu"]
    throughput.measure(throughput.parse([*words, "--out", str(tmp_path)]))
    frame, text = pd.read_csv(tmp_path / "cpu.csv"), (tmp_path / "cpu.md").read_text()
    assert text in capsys.readouterr().out
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert frame["round"].tolist() == [n for n in (0, 1, 2) for _ in range(4)]
    assert frame.who.tolist() == ["ours", "bad", "dead", "absent"] * 3
    mine = frame[(frame.who == "ours") & (frame["round"] > 0)]
    assert (mine["count"] % 5 == 0).all()
    assert (mine["count"] > 0).all()
    assert (mine.seconds >= 0.01).all()
    assert frame.seconds[0] >= 0.2  # the first two calls
    for who, reason in {
        "bad": "ValueError('no luck\\nwith details')",
        "dead": "no such library",
        "absent": "not installed: why",
    }.items():
        assert line(text, who)[3:] == ["", "", "", "", reason]
        assert frame[frame.who == who].rate.isna().all()


def test_a_contender_that_does_not_answer(tmp_path):
    """It is ended, and from then on the reason is the answer."""
    worker = throughput.Worker([sys.executable, "-c", "input(); input()"], tmp_path / "log")
    for _ in range(2):
        assert worker.ask(0.5, task="sac") == {"error": "no answer within 0 s"}
    assert worker.process.poll() is not None


def test_what_cannot_be_installed(tmp_path, monkeypatch):
    """The reason is pip's own line, and the next command tries again; a success is kept."""
    commands, codes = [], [0, 1, 0, 0, 0]

    def fake(command, **_):
        commands.append([str(word) for word in command])
        (tmp_path / "mbrl-lib").mkdir(exist_ok=True)
        return types.SimpleNamespace(returncode=codes.pop(0), stderr="hm\nERROR: no torch\n")

    monkeypatch.setattr(subprocess, "run", fake)
    peer = throughput.all_peers("cpu")["mbrl-lib"]
    with pytest.raises(throughput.Failure, match=r"^not installed: ERROR: no torch$"):
        throughput.install("mbrl-lib", peer, tmp_path)
    python = throughput.install("mbrl-lib", peer, tmp_path)
    assert throughput.install("mbrl-lib", peer, tmp_path) == python
    assert codes == []
    assert commands[0][1:4] == commands[2][1:4] == ["-m", "venv", "--clear"]
    assert commands[3][0] == commands[4][0] == python
    assert any(word.startswith("torch==2") and "+" not in word for word in commands[3])
    assert commands[4][-2:] == ["--no-deps", "mbrl==0.2.0"]


def test_functions_of_a_run_are_seen(monkeypatch):
    """A run of train() shows its functions and their arguments, which go on learning as in it."""
    monkeypatch.setattr(ours.torch, "compile", lambda function, **_: function)
    run, steps = ours.Run("mbpo_ftfl", "cpu"), []

    def on_step(step: int) -> None:
        steps.append(step)
        if step > 30:
            raise ours.Ready

    small = {"ensemble_size": 2, "num_elites": 1, "model_hidden": 8, "model_first_updates": 3}
    small |= {"learning_starts": 30, "updates_per_step": 2, "buffer_size": 1000}
    with pytest.raises(ours.Ready):
        run.train(on_step, env_id="InvertedPendulum-v5", batch_size=32, **small)
    assert steps == list(range(1, 32))
    counts = {name: len(spans) for name, spans in run.spans.items()}
    assert counts == {"model_update": 3, "model_step": 1, "sac_update": 2, "fit": 1}
    assert all(run.seconds(name) >= run.first[name][2] > 0 for name in counts.keys() - {"fit"})
    update, (agent, batch, noise), _ = run.first["sac_update"]
    before = agent["actor"]["t"].clone()
    update(agent, batch, noise)
    assert agent["actor"]["t"] == before + 1
    function, arguments, _ = run.first["rollout"]
    assert function(*arguments).shape == (400, 4 + 1 + 1 + 4 + 1)


def test_steps_of_a_whole_run(monkeypatch):
    """Turns are whole periods after the random steps, each with a fit, and tell their updates."""
    monkeypatch.setattr(ours.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(ours.script, "Args", Small)
    monkeypatch.setattr(ours, "FIT_EVERY", 2)
    monkeypatch.setattr(ours, "FIT_UPDATES", 3)
    requests, answers = iter([{}, {"seconds": 0.001}, {"seconds": 0.001}]), []
    channel = requests, lambda **answer: answers.append(answer)
    monkeypatch.setattr(ours, "channel", lambda: channel)
    task = {"script": "mbpo_ftfl", "device": "cpu", "env_id": "InvertedPendulum-v5"}
    with pytest.raises(SystemExit):
        ours.serve_steps(task)
    assert [answer["count"] for answer in answers] == [0, 2, 2]
    assert [answer["sac_updates"] for answer in answers] == [4, 8, 8]
    assert [answer["model_updates"] for answer in answers] == [3, 3, 3]
    for answer in answers:
        assert 0 < answer["sac_seconds"] + answer["model_seconds"] < answer["seconds"]
        assert answer["model_seconds"] < answer["fit_seconds"] < answer["seconds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--seconds", "0"], "--seconds above 0"),
        (["--threads", "9999"], "--threads must be from 1 to "),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    """Exit code 2, and a line that says what is wrong."""
    with pytest.raises(SystemExit) as stopped:
        throughput.parse([*words, "--device", "cpu"])
    errors = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert said in errors[0]


def test_the_help_has_examples(capsys):
    """Each example is a command line that is understood."""
    with pytest.raises(SystemExit):
        throughput.parse(["--help"])
    shown = capsys.readouterr().out
    for example in throughput.EXAMPLES.splitlines()[1:]:
        assert example in shown


def test_no_setting_is_lost_on_the_way():
    """Workers are started with JSON that they read as it was given."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import serve; print(serve.setting())"
    given = {"env_id": WALKER, "obs": 24, "action": 6, "device": "cpu"}
    command = [sys.executable, "-c", code, ROOT / "benchmarks" / "peers", json.dumps(given)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == str(given)
