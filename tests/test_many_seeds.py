"""Many seeds at once: the same runs as one by one, whatever happens to one of them."""

import shutil
import signal
import time

import many_seeds
import numpy as np
import pytest
import torch
from helpers_model import flat
from helpers_run import (
    ROOT,
    flags,
    folder_of,
    listing,
    one_error,
    read_checkpoint,
    read_evaluations,
    small,
    start,
)
from helpers_tools import assert_equal_runs, call

import mbpo_ftfl
import sac

SEEDS = [3, 1]
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
    own = CHANGES | (FITS if script != "sac" else {})
    return small(script, run_root=str(root), **own) | changes


def run_many(script, *words) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    how = {"return_unknown_args": True}
    return call(many_seeds.run, many_seeds.Options, script, *words, **how)


def seeds(*more: int) -> list:
    """The seeds as the command line has them."""
    return ["--seeds", *SEEDS, *more]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """By script: the root of its runs of all seeds at once, made when first asked for."""
    roots = {}

    def root_of(script: str):
        if script not in roots:
            roots[script] = tmp_path_factory.mktemp("together")
            words = flags(settings(script, roots[script]))
            code, _, err = run_many(ROOT / f"{script}.py", *seeds(), *words)
            assert code == 0, err
        return roots[script]

    return root_of


@pytest.mark.parametrize("script", [sac, mbpo_ftfl], ids=["sac", "mbpo_ftfl"])
def test_runs_equal_single_runs(script, together, tmp_path):
    """Settings to the letter; evaluations, and all that is learned, up to rounding."""
    name = script.__name__
    for seed in SEEDS:
        script.train(script.Args(seed=seed, **settings(name, tmp_path)))
        ours, theirs = (folder_of(x, name, seed=seed) for x in (together(name), tmp_path))
        text = (theirs / "args.json").read_text().replace(str(tmp_path), str(together(name)))
        assert (ours / "args.json").read_text() == text
        sizes = [(folder / "checkpoint.pt").stat().st_size for folder in (ours, theirs)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
        numbers = [np.array(read_evaluations(x)[1:], dtype=float) for x in (ours, theirs)]
        np.testing.assert_allclose(*numbers, rtol=1e-3)
        ours, theirs = read_checkpoint(ours), read_checkpoint(theirs)
        assert ours["progress"][:2] == theirs["progress"][:2]
        assert torch.equal(ours["generator"], theirs["generator"])
        for part in {"agent", "rows", "synthetic"} & ours.keys():
            a, b = flat(ours[part]), flat(theirs[part])
            assert a.keys() == b.keys()
            close = [((a[k] - b[k]).abs() < CLOSE * (1 + b[k].abs())).flatten() for k in a]
            assert torch.cat(close).double().mean() > SHARE, part


def test_killed_runs_go_on_to_the_same_end(together, tmp_path):
    """Killed, interrupted, and one of them discarded: all end equal to the bit nevertheless."""
    words = ["sac.py", *flags(settings("sac", tmp_path)), *map(str, seeds()), "--resume"]
    folders = [folder_of(tmp_path, "sac", seed=seed) for seed in SEEDS]
    for sign, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)]:
        child = start("benchmarks/many_seeds", *words, cwd=ROOT)
        while child.poll() is None and child.stdout.readline()[:4] != "seed":
            time.sleep(0.01)  # it has begun to train once a run has told of itself
        child.send_signal(sign)
        assert child.wait(timeout=100) in (code, 0)  # 0: it was faster
        if child.returncode == 1:
            assert one_error(child.stderr.read()) == "error: interrupted"
    shutil.rmtree(folders[1], ignore_errors=True)
    code, _, err = run_many(ROOT / "sac.py", *words[1:])
    assert code == 0, err
    for folder, seed in zip(folders, SEEDS, strict=True):
        assert_equal_runs(folder, folder_of(together("sac"), "sac", seed=seed))


def test_single_runs_can_be_taken_up(tmp_path):
    """A single run goes on together with new ones, and one of these goes on alone."""
    sac.train(sac.Args(seed=1, **settings("sac", tmp_path, total_timesteps=45)))
    words = [*flags(settings("sac", tmp_path)), "--resume", *seeds()]
    for _ in range(2):  # the second time nothing is left to do
        code, _, err = run_many(ROOT / "sac.py", *words)
        assert code == 0, err
        steps = [read_checkpoint(folder_of(tmp_path, "sac", seed=x))["progress"][0] for x in SEEDS]
        assert steps == [60, 60]
    sac.train(sac.Args(seed=3, resume=True, **settings("sac", tmp_path, total_timesteps=65)))
    assert read_checkpoint(folder_of(tmp_path, "sac", seed=3))["progress"][0] == 65


def test_a_seed_that_diverges_ends_alone(together, tmp_path, monkeypatch):
    """One line names it, the exit code tells, and the others are as if nothing had happened."""
    script, make_env = many_seeds.load_script("sac.py"), sac.make_env
    made = []

    def make_diverging(*args):
        env = make_env(*args)
        made.append(env)
        if len(made) == 3:  # each run makes one to train in and one to evaluate in
            step, count = env.step, [0]

            def faulty(action):
                count[0] += 1
                obs, reward, *rest = step(action)
                return obs, float("nan") if count[0] == 55 else reward, *rest

            env.step = faulty
        return env

    monkeypatch.setattr(script, "make_env", make_diverging)
    words = flags(settings("sac", tmp_path / "runs"))
    code, _, err = run_many(ROOT / "sac.py", *words, *seeds())
    assert code == 1
    failed = 1 if "seed 1:" in err else 3
    assert f"error: seed {failed}: reward is not finite at step 55" in err
    folders = [
        folder_of(root, "sac", seed=4 - failed) for root in (together("sac"), tmp_path / "runs")
    ]
    assert_equal_runs(*folders)


def test_what_goes_wrong_in_a_call_stops_all(tmp_path, monkeypatch):
    """An error of the joint update reaches whoever started the runs."""
    script = many_seeds.load_script("sac.py")

    def sac_update(*args, **settings):
        raise RuntimeError("broken")

    monkeypatch.setattr(script, "sac_update", sac_update)
    runs = many_seeds.ManySeeds(script, script.Args(**settings("sac", tmp_path)), SEEDS)
    with pytest.raises(RuntimeError, match="broken"):
        runs.train()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sac.py"], "--seeds"),
        (["README.md", "--seeds", "1"], "README.md"),
        (["sac.py", "--seeds", "1", "x"], "x"),
        (["sac.py", "--seeds", "1", "2", "1"], "each seed once"),
        (["sac.py", "--seeds", "1", "--seed=2"], "--seed and --track"),
        (["sac.py", "--seeds", "1", "--gamma", "2"], "--gamma must be"),
        (["mbpo.py", "--seeds", "1", "--env-id", "dmc/walker-rum"], "dmc/walker-run"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, monkeypatch):
    """What is wrong and what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run_many(ROOT / words[0], *words[1:])
    assert code == 2
    assert said in one_error(err)
    assert not listing(tmp_path)


def test_one_folder_that_is_refused_stops_all_before_they_start(together, tmp_path):
    """Nothing is written or discarded where one of the runs can't be started."""
    shutil.copytree(folder_of(together("sac"), "sac", seed=1), folder_of(tmp_path, "sac", seed=1))
    before = listing(tmp_path)
    code, _, err = run_many(ROOT / "sac.py", *flags(settings("sac", tmp_path)), *seeds())
    assert code == 2
    assert "go on with --resume" in one_error(err)
    assert listing(tmp_path) == before
