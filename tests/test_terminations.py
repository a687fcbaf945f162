"""Conditions of termination against the environments' own."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import mbpo

NEVER_END = {"HalfCheetah", "Swimmer", "Reacher", "Pusher"}
TASKS = [*(f"{task}-v5" for task in mbpo.HEALTHY), "Hopper-v4"]
CAN_END = [env_id for env_id in TASKS if env_id.split("-")[0] not in NEVER_END]
ALL_HEALTHY = {  # a next state of each task that is well inside its bounds
    "Hopper": [1.0, 0.0, *[0.0] * 9],
    "Walker2d": [1.2, 0.0, *[0.0] * 15],
    "Ant": [0.5, *[0.0] * 26],
    "Humanoid": [1.4, *[0.0] * 44],
    "InvertedPendulum": [0.0] * 4,
}
BOUNDS = [  # task, index, a value just inside, a value just outside
    ("Hopper", 0, 0.701, 0.699),
    ("Hopper", 1, 0.199, 0.201),
    ("Hopper", 1, -0.199, -0.201),
    *[("Hopper", i, sign * 99.9, sign * 100.1) for i in (2, 5, 10) for sign in (1, -1)],
    ("Walker2d", 0, 0.801, 0.799),
    ("Walker2d", 0, 1.999, 2.001),
    ("Walker2d", 1, 0.999, 1.001),
    ("Walker2d", 1, -0.999, -1.001),
    ("Ant", 0, 0.201, 0.199),
    ("Ant", 0, 0.999, 1.001),
    ("Ant", 26, 1e6, np.inf),
    ("Humanoid", 0, 1.001, 0.999),
    ("Humanoid", 0, 1.999, 2.001),
    ("InvertedPendulum", 1, 0.199, 0.201),
    ("InvertedPendulum", 1, -0.199, -0.201),
    ("InvertedPendulum", 3, 1e6, np.inf),
]


def random_steps(env_id: str, count: int, wild: bool = False):
    """Random transitions of the task, as check_termination gets them; maybe from odd poses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = mbpo.make_env(env_id)
    rng, over, episode = np.random.default_rng(0), True, 0
    for _ in range(count):
        if over or wild:
            obs, _ = env.reset(seed=episode)
            episode += 1
        if wild:  # every joint elsewhere, some far off
            task = env.unwrapped
            size = 10 ** rng.uniform(-2, 0.3)
            qpos = task.init_qpos + size * rng.uniform(-1, 1, task.init_qpos.shape)
            task.set_state(qpos, task.init_qvel + rng.normal(size=task.init_qvel.shape))
            obs = task._get_obs()
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, _, terminated, truncated, _ = env.step(action)
        yield obs, action, next_obs, terminated
        obs, over = next_obs, terminated or truncated
    env.close()


def compare(args, transitions, taken_for: str | None = None) -> tuple:
    """Counts of terminations, and of transitions; an InputError where the condition is wrong."""
    terminates = mbpo.termination_function(replace(args, env_id=taken_for or args.env_id))
    ended, count = 0, 0
    for obs, action, next_obs, terminated in transitions:
        mbpo.check_termination(terminates, args, obs, action, next_obs, terminated)
        said = bool(terminates(*map(torch.as_tensor, (obs, action, next_obs))))
        assert said == terminated
        ended, count = ended + terminated, count + 1
    return ended, count


@pytest.mark.parametrize(
    ("env_id", "wild"), [(each, False) for each in TASKS] + [(each, True) for each in CAN_END]
)
def test_conditions_are_those_of_the_environments(env_id, wild):
    """Over 500 random steps, or from odd poses, the model's condition says when a task ends."""
    n = 200 if wild else 500
    ended, count = compare(mbpo.Args(env_id=env_id), random_steps(env_id, n, wild))
    assert count == n
    assert 0.05 * n * wild < ended < 0.95 * n if env_id in CAN_END else ended == 0


@pytest.mark.parametrize(("task", "index", "inside", "outside"), BOUNDS)
def test_every_bound_is_where_the_task_has_it(task, index, inside, outside):
    """A state just inside goes on; the same just outside, or where it is NaN, has ended."""
    terminates = mbpo.termination_function(mbpo.Args(env_id=f"{task}-v5"))
    states = torch.tensor([ALL_HEALTHY[task]] * 4)
    states[1:, index] = torch.tensor([inside, outside, torch.nan])
    ended = terminates(*[x.view(2, 2, -1) for x in (states, torch.zeros(4, 1), states)])
    assert ended.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("env_id", "taken_for"),
    [("Ant-v5", "Humanoid-v5"), ("Humanoid-v5", "Ant-v5"), ("Hopper-v5", "Walker2d-v5")],
)
def test_condition_of_another_task_is_noticed(env_id, taken_for):
    """A wrong condition is an InputError that names the table of conditions and the task."""
    message = rf"HEALTHY in this file is wrong for {env_id}: terminated="
    with pytest.raises(mbpo.InputError, match=message):
        compare(mbpo.Args(env_id=env_id), random_steps(env_id, 2000), taken_for)


@pytest.mark.parametrize("terminated", [True, False])
def test_check_of_a_termination_names_task_state_and_what_happened(terminated):
    """The words say which is wrong, for which task, what the task said, and s' in four digits."""
    args = mbpo.Args(env_id="Hopper-v5", never_terminates=terminated)
    terminates = mbpo.termination_function(args)
    fallen = np.array([0.123456, -1.5, *[0.0] * 9])
    parts = fallen + 1, np.zeros(3, np.float32), fallen
    mbpo.check_termination(terminates, args, *parts, not terminated)
    with pytest.raises(mbpo.InputError) as error:
        mbpo.check_termination(terminates, args, *parts, terminated)
    wrong = "--never-terminates is" if terminated else "HEALTHY in this file is"
    state = ", ".join(["0.1235", "-1.5", *["0"] * 9])
    said = f"{wrong} wrong for Hopper-v5: {terminated=} where s' = [{state}]"
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("env_id", "named"),
    [
        *[("Pendulum-v1", "Pendulum"), ("Ant-vel-v0", "Ant-vel"), ("Ant-v5b", "Ant-v5b")],
        *[("Half-velocity-v0", "Half-velocity"), ("my.tasks:HopperX-v4", "HopperX")],
    ],
)
def test_a_task_with_no_condition_is_refused_by_its_whole_name(env_id, named):
    """An id must match to the letter but for its version, and the refusal says how to go on."""
    message = rf"--env-id {env_id}: {named} is not in this file's HEALTHY: .*--never-terminates"
    with pytest.raises(mbpo.InputError, match=message):
        mbpo.termination_function(mbpo.Args(env_id=env_id))


def test_tasks_that_never_end():
    """Said so, of dm_control or listed so: no state ends them, whatever it is."""
    states = torch.full((2, 4, 3), torch.nan)
    for args in [
        mbpo.Args(env_id="Pendulum-v1", never_terminates=True),
        mbpo.Args(env_id="Hopper-v5", never_terminates=True),
        mbpo.Args(env_id="dmc/hopper-hop"),
        mbpo.Args(env_id="HalfCheetah-v5"),
    ]:
        ended = mbpo.termination_function(args)(states, states[..., :1], states)
        assert ended.dtype == torch.bool
        assert ended.tolist() == [[False] * 4] * 2


@pytest.mark.parametrize("env_id", ["Hopper-v4", "gymnasium.envs.mujoco:Hopper-v12"])
def test_module_and_version_do_not_change_the_condition(env_id):
    """A task of another version, or named with the module that registers it, ends alike."""
    states = torch.tensor([ALL_HEALTHY["Hopper"]] * 2)
    states[1, 0] = 0.6
    terminates = mbpo.termination_function(mbpo.Args(env_id=env_id))
    assert terminates(states, torch.zeros(2, 1), states).tolist() == [False, True]
