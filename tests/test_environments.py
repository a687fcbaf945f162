"""What the scripts make of tasks that are faulty, odd, or break their word late."""

import numpy as np
import pytest
from environments import LATE
from helpers_run import (
    Outcome,
    flags,
    folder_of,
    read_scalars,
    same,
    same_learning,
    saved_step,
    small,
)

import mbpo
import sac


def settings(name: str, script=sac, **changes) -> dict:
    """Settings of a small run on one of the tasks."""
    rule = {} if script is sac else {"never_terminates": True}
    return small(script.__name__, env_id=f"environments:{name}", **(rule | changes))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run on the task without fault."""
    return Outcome(sac, settings("Plain-v0", run_root=tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("name", ["SameArray", "NegativeStride", "ArrayReward", "StrictBounds"])
def test_what_an_odd_task_returns_is_taken_rightly(name, plain, tmp_path):
    """Arrays used again or for numbers, bounds held strictly: all learn as usual."""
    odd = Outcome(sac, settings(f"{name}-v0", run_root=tmp_path))
    assert same_learning(odd.saved, plain.saved)
    assert odd.evaluations == plain.evaluations
    assert not same(odd.rows[:, :3], odd.rows[:, 5:8])  # s is not s'


def test_terminations_are_stored_and_time_limits_are_not(plain, tmp_path):
    """Both end an episode; the critic's target ends with the former alone."""
    one_step = Outcome(sac, settings("OneStep-v0", run_root=tmp_path))
    for outcome, length, stored in ((plain, 20, 0), (one_step, 1, 1)):
        assert outcome.rows[:, -1].tolist() == [stored] * 80
        expected = [(step, length) for step in range(length, 81, length)]
        assert read_scalars(outcome.folder)["train/episode_length"] == expected


def test_actions_are_scaled_to_the_tasks_range():
    """-1 and 1 are the ends of InvertedPendulum's [-3, 3], and not a rounding error beyond."""
    for action, expected in [(-1, -3), (0.5, 1.5), (1, 3)]:
        env = sac.make_env("InvertedPendulum-v5")
        env.reset(seed=1)
        env.step(np.array([action], np.float32))
        assert env.unwrapped.data.ctrl[0] == pytest.approx(expected)
        env = sac.make_env("environments:StrictBounds-v0")
        env.reset(seed=1)
        env.step(np.array([action], np.float32))  # the task itself asserts
        assert (env.action_space.low, env.action_space.high) == (-1, 1)


VECTORS = "actions and observations must be vectors, the actions of floats; not "
REFUSED = {
    "IntegerAction": f"{VECTORS}Box(0, 10, (1,), int64)",
    "FixedAction": "actions must be bounded, low < high; not Box([-1. 2.], [1. 2.]",
    "MatrixAction": VECTORS,
    "UnboundedAction": "actions must be bounded",
    "ChosenAction": f"{VECTORS}Discrete(3)",
    "LongObservation": "reset returned an observation of shape (4,) and type float32, but its ",
    "OldReset": "reset returned array([",
    "OldStep": "step returned (array([",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_task_that_cannot_be_trained_is_one_line(name, refused):
    """It names the task and what is wrong with it, before any file is written."""
    line = refused(sac, flags(settings(f"{name}-v0")))
    assert line.startswith(f"error: --env-id environments:{name}-v0: {REFUSED[name]}")


@pytest.mark.parametrize("library", ["Numpy", "Python", "Torch"])
def test_a_task_that_draws_from_a_global_generator(library, tmp_path):
    """Equal seeds learn equally whatever was drawn before, with evaluations or without."""
    name, runs = f"{library}sGenerator-v0", []
    for i, every in enumerate([30, 30, 0]):  # in the middle of an episode
        changes = {"eval_frequency": every, "run_root": tmp_path / str(i)}
        runs.append(Outcome(mbpo, settings(name, mbpo, **changes)))
    first, second, never = runs
    assert first.evaluations == second.evaluations
    assert same_learning(first.saved, second.saved)
    assert same_learning(first.saved, never.saved)
    assert len(set(first.rows[::20, 0].tolist())) == 4  # each of the episodes has its own start


LATE_FAULTS = {  # the script, its exit code, and how its line begins
    "LateLongObservation-v0": (sac, 2, "--env-id {}: step returned an observation of shape (4,)"),
    "LateText-v0": (sac, 2, "--env-id {}: step returned 'much' as a reward or flag"),
    "LateError-v0": (sac, 1, "the run ended early; "),
    "LateNanReward-v0": (sac, 1, f"reward is not finite at step {LATE}: the run stops"),
    "LateEnd-v0": (mbpo, 2, "--never-terminates is wrong for {}: terminated=True where s' = ["),
    "Hopper-v99": (mbpo, 2, "HEALTHY in this file is wrong for {}: terminated=False where s' = ["),
}


@pytest.mark.parametrize("every", [20, 500])
@pytest.mark.parametrize("name", LATE_FAULTS)
def test_a_task_that_goes_wrong_late(name, every, main, done, tmp_path):
    """One line has the step; what was saved stays, and what was not does not block a new run."""
    script, expected, said = LATE_FAULTS[name]
    rule = {"never_terminates": False} if name[0] == "H" else {}  # by HEALTHY of the name
    words = settings(name, script, eval_frequency=0, checkpoint_frequency=every, **rule)
    code, _, err = main(script, flags(words))
    *traceback, line = err.splitlines()
    assert code == expected
    assert line.startswith("error: " + said.format(words["env_id"]))
    if name == "LateError-v0":
        assert traceback[-1] == "RuntimeError: the physics is lost"
        assert ("saved up to step 40, from where --resume" in line) == (every == 20)
        assert ("nothing is saved" in line) == (every == 500)
    else:
        assert not traceback
        assert line.endswith(f" (at step {LATE})") == (code == 2)
    folder = folder_of(tmp_path, script.__name__, words["env_id"])
    assert folder.exists() == (every == 20 or code == 1)
    assert every == 500 or saved_step(folder) == 40
    if rule:  # the corrected command goes on
        words |= {"never_terminates": True, "resume": every == 20}
        assert f"from step {40 if every == 20 else 0}\n" in done(script, flags(words))
        assert saved_step(folder) == 80


def test_every_domain_of_the_suite_can_be_made():
    """Observations are flat, actions in [-1, 1]; of lqr alone, actions have no bounds."""
    from dm_control import suite

    tasks = {domain: task for domain, task in suite.ALL_TASKS if task != "escape"}
    assert len(tasks) >= 15
    for domain, task in tasks.items():
        if domain == "lqr":
            continue
        env = sac.make_env(f"dmc/{domain}-{task}")
        obs, _ = env.reset(seed=1)
        assert obs.shape == env.observation_space.shape == (obs.size,)
        assert {*env.action_space.low, *env.action_space.high} == {-1, 1}
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isfinite([*obs, reward]).all()
        assert (terminated, truncated) == (False, False)


def test_gym_tasks_have_the_papers_observations():
    """Ant and Humanoid are cut to positions and velocities."""
    for env_id, dims in {"Ant-v5": (27, 8), "Humanoid-v5": (45, 17), "Hopper-v5": (11, 3)}.items():
        env = sac.make_env(env_id)
        assert (env.observation_space.shape[0], env.action_space.shape[0]) == dims


def test_an_episode_of_the_suite_ends_at_its_time_limit():
    """It is cut after 1,000 steps, and never terminated."""
    env = sac.make_env("dmc/cartpole-balance")
    env.reset(seed=1)
    steps = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert steps == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("env_id", ["dmc/walker-run", "Hopper-v5"])
def test_a_seed_decides_where_an_episode_starts(env_id):
    """The same seed gives the same state, another one another."""
    env = sac.make_env(env_id)
    one, same_one, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    assert np.array_equal(one, same_one)
    assert not np.array_equal(one, other)
