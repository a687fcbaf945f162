"""Many seeds at once: the same runs as one by one, whatever happens to one of them."""

import shutil
import signal
import sys
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from helpers_model import flat
from helpers_run import (
    NAMES,
    ROOT,
    SCRIPTS,
    flags,
    folder_of,
    listing,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same,
    small,
    start,
)
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(ROOT / "benchmarks"))

import many_seeds

import sac

SEEDS = [3, 1, 8]
CHANGES = {"total_timesteps": 60, "eval_frequency": 30, "checkpoint_frequency": 10}
FITS = {"model_train_frequency": 20, "model_patience": 2, "model_lr": 0.005}
FITS |= {"rollout_schedule": (45, 55, 1, 3)}
# Products of stacked matrices are summed in another order, which changes the last bits of a number,
# 1e-7 of it. Twenty updates later most weights still agree to 1e-6; but where a gradient is all but
# zero, Adam makes a whole step, 3e-4, of its last bits, so a few may differ by more. Of one update
# with a wrong batch nearly all weights would tell.
CLOSE, SHARE = 1e-5, 0.95


def settings(script: str, root, **changes) -> dict:
    """Settings of a run of a second or two, with fits that end early and growing rollouts."""
    return (
        small(script, run_root=str(root), **CHANGES, **(FITS if script != "sac" else {})) | changes
    )


def many(script: str, root, **changes) -> many_seeds.ManySeeds:
    """Runs of all seeds, to be trained in this process."""
    module = many_seeds.load(ROOT / f"{script}.py")
    return many_seeds.ManySeeds(module, module.Args(**settings(script, root, **changes)), SEEDS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs in this process have one thread, as their children do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """By script: the root of its runs of all seeds at once, made when first asked for."""
    roots = {}

    def root_of(script: str):
        if script not in roots:
            roots[script] = tmp_path_factory.mktemp("together")
            many(script, roots[script]).train()
        return roots[script]

    return root_of


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the tool in this process; returns its exit code and what it says on stderr."""
    handler = signal.getsignal(signal.SIGINT)

    def run_main(*words) -> tuple:
        monkeypatch.setattr(sys, "argv", ["many_seeds.py", *map(str, words)])
        try:
            code = many_seeds.main()
        except SystemExit as end:
            code = end.code
        return code or 0, capsys.readouterr().err

    yield run_main
    signal.signal(signal.SIGINT, handler)


def assert_close_runs(one, other) -> None:
    """All but a few of the numbers that two runs have saved are equal up to rounding."""
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert ours["progress"][:2] == theirs["progress"][:2]
    assert torch.equal(ours["generator"], theirs["generator"])
    for saved in (ours, theirs):
        for moment in ("m", "v"):  # divided by small variances, these are any numbers
            saved.get("model", {"learner": {moment: {}}})["learner"].pop(moment)
    for part in {"agent", "rows", "model", "synthetic"} & ours.keys():
        a, b = (flat(saved[part]) for saved in (ours, theirs))
        assert a.keys() == b.keys()
        close = [((a[k] - b[k]).abs() < CLOSE * (1 + b[k].abs())).flatten() for k in a]
        assert torch.cat(close).double().mean() > SHARE, part


def assert_equal_runs(one, other) -> None:
    """Evaluations, TensorBoard's curves and all of the checkpoint are equal to the bit."""
    assert read_evaluations(one) == read_evaluations(other)
    curves = [read_scalars(folder) | {"train/steps_per_second": None} for folder in (one, other)]
    assert curves[0] == curves[1]
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    assert ours["progress"][:2] == theirs["progress"][:2]
    for part in ours.keys() - {"settings", "progress"}:
        assert same(ours[part], theirs[part]), part


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_runs_equal_single_runs(script, together, tmp_path):
    """Settings to the letter; evaluations, curves and all that is learned up to rounding."""
    name, updates = script.__name__, set()
    for seed in SEEDS:
        script.train(script.Args(seed=seed, **settings(name, tmp_path)))
        ours, theirs = (folder_of(x, name, seed=seed) for x in (together(name), tmp_path))
        text = (theirs / "args.json").read_text().replace(str(tmp_path), str(together(name)))
        assert (ours / "args.json").read_text() == text
        sizes = [(folder / "checkpoint.pt").stat().st_size for folder in (ours, theirs)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
        numbers = [np.array(read_evaluations(x)[1:], dtype=float) for x in (ours, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-3)
        assert_close_runs(ours, theirs)
        scalars, expected = read_scalars(ours), read_scalars(theirs)
        assert scalars.keys() == expected.keys()
        for tag in ("train/episode_return", "model/updates"):
            assert scalars.get(tag) == expected.get(tag)
        updates.add(str(scalars.get("model/updates", seed)))
    assert len(updates) > 1  # some fits end early


def saved_step(folder) -> int:
    """The step of a run's checkpoint, 0 without one."""
    return read_checkpoint(folder)["progress"][0] if (folder / "checkpoint.pt").exists() else 0


def test_killed_runs_go_on_to_the_same_end(together, tmp_path, run):
    """Killed, interrupted, and one of them discarded: all end equal to the bit nevertheless."""
    words = ["mbpo_ftfl.py", *flags(settings("mbpo_ftfl", tmp_path)), "--seeds", *map(str, SEEDS)]
    folders = [folder_of(tmp_path, "mbpo_ftfl", seed=seed) for seed in SEEDS]
    saved = 40 * len(SEEDS)  # steps, in sum
    for end, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)]:
        child = start("benchmarks/many_seeds", *words, "--resume", cwd=ROOT)
        while child.poll() is None and (steps := sum(map(saved_step, folders))) <= saved:
            time.sleep(0.01)
        child.send_signal(end)
        assert child.wait(timeout=100) in (code, 0)  # 0: it was faster
        assert end == signal.SIGKILL or one_error(child.stderr.read()) == "error: interrupted"
        saved = steps
    shutil.rmtree(folders[1])
    child = run("benchmarks/many_seeds", *words, "--resume", cwd=ROOT)
    assert child.returncode == 0, child.stderr
    for folder, seed in zip(folders, SEEDS, strict=True):
        assert_equal_runs(folder, folder_of(together("mbpo_ftfl"), "mbpo_ftfl", seed=seed))


def test_single_runs_can_be_taken_up(tmp_path, main):
    """A single run goes on together with new ones, and one of these goes on alone."""
    sac.train(sac.Args(seed=1, **settings("sac", tmp_path, total_timesteps=45)))
    words = [ROOT / "sac.py", *flags(settings("sac", tmp_path)), "--resume", "--seeds", *SEEDS]
    assert main(*words) == (0, "")
    assert [saved_step(folder_of(tmp_path, "sac", seed=seed)) for seed in SEEDS] == [60] * 3
    assert main(*words) == (0, "")  # nothing is left to do
    sac.train(sac.Args(seed=8, resume=True, **settings("sac", tmp_path, total_timesteps=65)))
    assert saved_step(folder_of(tmp_path, "sac", seed=8)) == 65


def test_a_seed_that_diverges_ends_alone(together, tmp_path, main):
    """One line names it, the exit code tells, and the others are as if nothing had happened."""
    text, check = (ROOT / "sac.py").read_text(), "check_finite(step, observation"
    fault = 'reward = float("nan") if (args.seed, step) == (1, 55) else reward'
    assert check in text
    script = tmp_path / "sac.py"
    script.write_text(text.replace(check, f"{fault}\n            {check}"))
    words = flags(settings("sac", tmp_path / "runs"))
    code, err = main(script, *words, "--seeds", *SEEDS)
    assert code == 1
    assert one_error(err) == "error: seed 1: reward is not finite at step 55: the run stops"
    for seed in (3, 8):
        folders = [
            folder_of(root, "sac", seed=seed) for root in (together("sac"), script.parent / "runs")
        ]
        assert_equal_runs(*folders)


def test_what_goes_wrong_in_a_call_stops_all(tmp_path):
    """An error of the joint update reaches whoever started the runs; no thread is left waiting."""
    runs = many("sac", tmp_path)

    def sac_update(*args, **settings):
        raise RuntimeError("broken")

    runs.script.sac_update = sac_update
    with pytest.raises(RuntimeError, match="broken"):
        runs.train()
    assert not [x for x in threading.enumerate() if x.name.startswith("seed")]


def test_updates_are_compiled_once(together, tmp_path, monkeypatch):
    """Each function is traced whole, and once, however many runs wait for it."""
    graphs, real = CompileCounterWithBackend("aot_eager"), torch.compile  # no code made: quick

    def traced(function, mode=None, **options):
        return real(function, backend=graphs, **options)

    monkeypatch.setattr(torch, "compile", traced)
    many("mbpo_ftfl", tmp_path, compile=True).train()
    assert graphs.frame_count == 1 + 3  # the first asks for a compiler
    for seed in SEEDS:
        folders = [folder_of(x, "mbpo_ftfl", seed=seed) for x in (tmp_path, together("mbpo_ftfl"))]
        assert '"compile": true' in (folders[0] / "args.json").read_text()
        assert_close_runs(*folders)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sac.py"], "--seeds 1 2 3"),
        (["--seeds", "1"], "SCRIPT"),
        (["README.md", "--seeds", "1"], "README.md"),
        (["gone.py", "--seeds", "1"], "gone.py"),
        (["sac.py", "--seeds", "1", "x"], "'x'"),
        (["sac.py", "--seeds", "1", "2", "1"], "each seed once"),
        (["sac.py", "--seeds", "1", "--seed", "2"], "instead of --seed"),
        (["sac.py", "--seeds", "1", "--seed=2"], "instead of --seed"),
        (["sac.py", "--seeds", "1", "--track"], "--track"),
        (["sac.py", "--seeds", "1", "--measure", "2"], "or else --measure"),
        (["sac.py", "--measure", "0"], "at least 1"),
        (["sac.py", "--seeds", "1", "-1"], "--seed must be from 0 to 2^63 - 1, not -1"),
        (["sac.py", "--seeds", "1", "--gamma", "2"], "--gamma must be"),
        (["mbpo.py", "--seeds", "1", "--env-id", "dmc/walker-rum"], "dmc/walker-run"),
    ],
)
def test_bad_input_is_one_line(words, said, main, tmp_path, monkeypatch):
    """What is wrong and what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    words = [ROOT / word if (ROOT / word).is_file() else word for word in words]
    code, err = main(*words)
    assert said in one_error(err)
    assert code == 2
    assert not listing(tmp_path)


def test_one_folder_that_is_refused_stops_all_before_they_start(together, tmp_path, main):
    """Nothing is written or discarded where one of the runs can't be started."""
    words = [ROOT / "sac.py", *flags(settings("sac", tmp_path)), "--seeds", *SEEDS]
    shutil.copytree(folder_of(together("sac"), "sac", seed=8), folder_of(tmp_path, "sac", seed=8))
    before = listing(tmp_path)
    for more, said in [
        ([], "--overwrite discards"),
        (["--resume", "--gamma", "0.5"], "gamma 0.99"),
    ]:
        code, err = main(*words, *more)
        assert code == 2
        assert said in one_error(err)
        assert str(folder_of(tmp_path, "sac", seed=8)) in err
        assert listing(tmp_path) == before


def test_measure_writes_a_table(tmp_path, main, monkeypatch):
    """Updates and environment steps per second, summed over seeds."""
    monkeypatch.setattr(many_seeds, "RESULTS", tmp_path)
    words = flags(settings("mbpo_ftfl", tmp_path / "none", updates_per_step=20))
    assert main(ROOT / "mbpo_ftfl.py", *words, "--measure", "2")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"many_seeds_cpu.csv", "many_seeds_cpu.md"}
    (row,) = pd.read_csv(tmp_path / "many_seeds_cpu.csv").to_dict("records")
    assert row["seeds"] == 2
    for column in ("sac_updates_per_s", "model_updates_per_s", "steps_per_s"):
        assert row[column] > 0
