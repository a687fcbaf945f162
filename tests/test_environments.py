"""What the scripts make of tasks that are faulty, odd, or break their word late."""

import numpy as np
import pytest
from environments import LATE
from helpers_run import (
    Outcome,
    flags,
    folder_of,
    one_error,
    read_scalars,
    same,
    same_learning,
    saved_step,
    small,
)

import mbpo
import mbpo_ftfl
import sac


def settings(name: str, root=None, script=sac, **changes) -> dict:
    """Settings of a small run on one of the tasks."""
    if script is not sac:
        changes = {"never_terminates": True} | changes
    if root is not None:
        changes["run_root"] = str(root)
    return small(script.__name__, env_id=f"environments:{name}", **changes)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run on the task without fault."""
    return Outcome(sac, settings("Plain-v0", tmp_path_factory.mktemp("plain")))


ODD = ["SameArray", "NegativeStride", "ArrayReward", "ArrayFlag", "StrictBounds", "StrictSeeds"]


@pytest.mark.parametrize("name", ODD)
def test_what_an_odd_task_returns_is_taken_rightly(name, plain, tmp_path):
    """Arrays used again or for numbers, bounds and seeds held strictly: all learn as usual."""
    odd = Outcome(sac, settings(f"{name}-v0", tmp_path))
    assert same_learning(odd.saved, plain.saved)
    assert odd.evaluations == plain.evaluations
    assert not same(odd.rows[:, :3], odd.rows[:, 5:8])  # s is not s'


def test_a_scaled_action_is_within_its_bounds():
    """The ends of [-1, 1] are the bounds, and not a rounding error beyond."""
    env = sac.make_env("environments:StrictBounds-v0")
    env.reset(seed=1)
    for action in (-1, -0.3, 0.3, 1):
        env.step(np.float32([action]))  # the task itself asserts
    env = sac.make_env("environments:StrictBounds-v0")
    assert env.action_space.low.tolist() == [-1]
    assert env.action_space.high.tolist() == [1]


VECTORS = "actions and observations must be vectors"
REFUSED = {
    "IntegerAction": f"{VECTORS}, the actions of floats; not Box(0, 10, (1,), int64)",
    "FixedAction": "actions must be bounded, low < high; not Box([-1. 2.], [1. 2.]",
    "MatrixAction": VECTORS,
    "ColumnAction": VECTORS,
    "ScalarAction": VECTORS,
    "UnboundedAction": "actions must be bounded",
    "ChosenAction": f"{VECTORS}, the actions of floats; not Discrete(3)",
    "Picture": VECTORS,
    "LongObservation": "reset returned an observation of shape (4,) and type float32, but its "
    "space is Box(-inf, inf, (3,), float32)",
    "OldReset": "reset returned array([",
    "OldStep": "step returned (array([",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_task_that_cannot_be_trained_is_one_line(name, refused):
    """It names the task and what is wrong with it, before any file is written."""
    line = refused(sac, flags(settings(f"{name}-v0")))
    assert line.startswith(f"error: --env-id environments:{name}-v0: ")
    assert REFUSED[name] in line


@pytest.mark.parametrize("library", ["Numpy", "Python", "Torch"])
def test_a_task_that_draws_from_a_global_generator(library, tmp_path):
    """Equal seeds learn equally whatever was drawn before, with evaluations or without."""
    name = f"{library}sGenerator-v0"
    often = {"eval_frequency": 30}  # in the middle of an episode
    first = Outcome(mbpo, settings(name, tmp_path / "first", mbpo, **often))
    second = Outcome(mbpo, settings(name, tmp_path / "second", mbpo, **often))
    assert first.evaluations == second.evaluations
    assert same_learning(first.saved, second.saved)
    never = Outcome(mbpo, settings(name, tmp_path / "never", mbpo, eval_frequency=0))
    assert same_learning(first.saved, never.saved)
    assert len(set(first.rows[::20, 0].tolist())) == 4  # each of the episodes has its own start


def test_episodes_of_one_step(tmp_path):
    """Every transition ends an episode, and says so."""
    outcome = Outcome(sac, settings("OneStep-v0", tmp_path))
    assert outcome.rows[:, -1].tolist() == [1] * 80
    assert read_scalars(outcome.folder)["train/episode_length"] == [(t, 1) for t in range(1, 81)]


BROKEN = {
    "LateLongObservation": "step returned an observation of shape (4,)",
    "LateText": "step returned 'much' as a reward or flag",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_task_that_breaks_its_word_late(name, main, tmp_path):
    """One line has the step; what it leaves does not block the corrected command."""
    words = settings(f"{name}-v0", eval_frequency=0)
    folder = folder_of(tmp_path, "sac", words["env_id"])
    code, _, err = main(sac, flags(words))
    assert code == 2
    assert one_error(err).startswith(f"error: --env-id environments:{name}-v0: {BROKEN[name]}")
    assert err.endswith(f"(at step {LATE})\n")
    assert not folder.exists()
    code, _, err = main(sac, flags(words | {"checkpoint_frequency": 20}))
    assert (code, saved_step(folder)) == (2, LATE - 20)
    assert f"(at step {LATE})" in one_error(err)


@pytest.mark.parametrize(("every", "told"), [(20, "saved up to step 40, "), (0, "nothing")])
def test_a_task_that_raises_an_error_late(every, told, main):
    """After its traceback one line has the step that is saved, and how to go on from there."""
    words = settings("LateError-v0", eval_frequency=0, checkpoint_frequency=every)
    code, _, err = main(sac, flags(words))
    *traceback, last = err.splitlines()
    assert code == 1
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "RuntimeError: the physics is lost"
    assert last.startswith(f"error: the run ended early; {told}")
    assert ("--resume goes on" in last) == (every > 0)


@pytest.mark.parametrize(("name", "part"), [("Reward", "reward"), ("Observation", "observation")])
def test_a_number_that_is_not_finite_stops_the_run(name, part, main):
    """The task's nan ends the run with a line of the quantity and the step."""
    code, _, err = main(sac, flags(settings(f"LateNan{name}-v0", eval_frequency=0)))
    assert code == 1
    assert one_error(err) == f"error: {part} is not finite at step {LATE}: the run stops"


def test_a_task_that_ends_although_it_never_should(main, tmp_path):
    """--never-terminates is held against every real transition; the line has task and state."""
    words = flags(settings("LateEnd-v0", script=mbpo, eval_frequency=0))
    code, _, err = main(mbpo, words)
    assert code == 2
    said = "--never-terminates is wrong for environments:LateEnd-v0: terminated=True where s' = ["
    assert said in one_error(err)
    assert err.endswith(f"] (at step {LATE})\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("saved", [False, True])
def test_a_task_that_goes_on_where_healthy_says_it_ends(saved, main, tmp_path):
    """The line names the rule; the corrected command then trains, or goes on."""
    changes = {"eval_frequency": 0, "checkpoint_frequency": 20 if saved else 500}
    words = settings("Hopper-v99", script=mbpo, never_terminates=False, **changes)
    code, _, err = main(mbpo, flags(words))
    assert code == 2
    said = "HEALTHY in this file is wrong for environments:Hopper-v99: terminated=False where"
    assert f"{said} s' = [0.5, 0, 0] (at step {LATE})" in one_error(err)
    folder = folder_of(tmp_path, "mbpo", "environments:Hopper-v99")
    assert folder.exists() == saved
    words |= {"never_terminates": True, "resume": saved}
    code, out, err = main(mbpo, flags(words))
    assert (code, err) == (0, "")
    assert f"from step {LATE - 20 if saved else 0}" in out.splitlines()[0]
    assert saved_step(folder) == 80


def test_a_model_must_know_when_a_task_of_ones_own_ends(main, refused, monkeypatch):
    """It is told so with a flag, or with a condition in HEALTHY for the whole name."""
    words = flags(settings("Ant-vel-v0", script=mbpo, never_terminates=False))
    line = refused(mbpo, words)
    assert "Ant-vel is not in this file's HEALTHY" in line
    assert "--never-terminates" in line
    assert main(mbpo, [*words, "--never-terminates"])[0] == 0
    monkeypatch.setitem(mbpo.HEALTHY, "Ant-vel", lambda s, a, n: n[..., 0].abs() < 9)
    assert main(mbpo, [*words, "--exp-name", "healthy"])[0] == 0


def test_an_input_that_begins_to_vary_late(tmp_path):
    """Rewards that the model imagines stay of the order of the real ones."""
    changes = {"total_timesteps": 450, "learning_starts": 250, "model_train_frequency": 250}
    changes |= {"eval_frequency": 0, "real_ratio": 0.5}
    outcome = Outcome(mbpo_ftfl, settings("NearlyConstant-v0", tmp_path, mbpo_ftfl, **changes))
    last = outcome.rows[:, 2].numpy()
    assert np.ptp(last[:250]) < 1e-5
    assert np.ptp(last[310:]) > 1
    real, imagined = outcome.rows[:, 4].abs().max(), outcome.synthetic[:, 4].abs().max()
    assert imagined < 10 * real


def test_every_domain_of_the_suite_can_be_made():
    """Observations are flat, actions in [-1, 1]; of lqr alone, actions have no bounds."""
    from dm_control import suite

    tasks = {domain: task for domain, task in suite.ALL_TASKS if task != "escape"}
    del tasks["lqr"]
    assert len(tasks) >= 15
    for domain, task in tasks.items():
        env = sac.make_env(f"dmc/{domain}-{task}")
        obs, _ = env.reset(seed=1)
        assert obs.shape == env.observation_space.shape == (obs.size,)
        assert (env.action_space.low == -1).all()
        assert (env.action_space.high == 1).all()
        for _ in range(2):
            obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert np.isfinite(obs).all()
            assert np.isfinite(reward)
            assert not terminated
            assert not truncated
        env.close()


@pytest.mark.parametrize(
    ("env_id", "dims"), [("Ant-v5", (27, 8)), ("Humanoid-v5", (45, 17)), ("Hopper-v5", (11, 3))]
)
def test_gym_tasks_have_the_papers_observations(env_id, dims):
    """Ant and Humanoid are cut to positions and velocities."""
    env = sac.make_env(env_id)
    assert (env.observation_space.shape[0], env.action_space.shape[0]) == dims


def test_an_episode_of_the_suite_ends_at_its_time_limit():
    """It is cut after 1,000 steps, and never terminated."""
    env = sac.make_env("dmc/cartpole-balance")
    env.reset(seed=1)
    steps = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert steps == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("env_id", ["dmc/walker-run", "Hopper-v5"])
def test_a_seed_decides_a_trajectory(env_id):
    """The same seed gives the same episode, another one another."""

    def episode(seed):
        env, actions = sac.make_env(env_id), np.random.default_rng(0)
        states = [env.reset(seed=seed)[0]]
        for _ in range(20):
            action = actions.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            states.append(env.step(action)[0])
        return np.array(states)

    assert np.array_equal(episode(3), episode(3))
    assert not np.array_equal(episode(3)[0], episode(4)[0])


def test_actions_are_scaled_to_the_tasks_range():
    """-1 and 1 are the ends of InvertedPendulum's [-3, 3]."""
    for action, expected in [(-1, -3), (0.5, 1.5), (1, 3)]:
        env = sac.make_env("InvertedPendulum-v5")
        env.reset(seed=1)
        env.step(np.array([action], np.float32))
        assert env.unwrapped.data.ctrl[0] == pytest.approx(expected)
