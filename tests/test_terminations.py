"""Conditions of termination against the environments' own."""

import numpy as np
import pytest
import torch

import mbpo

TASKS = [*(f"{task}-v5" for task in mbpo.HEALTHY), "Hopper-v4"]
ALL_HEALTHY = {  # of each task that can end, a next state well inside its bounds
    "Hopper": [1.0, 0.0, *[0.0] * 9],
    "Walker2d": [1.2, 0.0, *[0.0] * 15],
    "Ant": [0.5, *[0.0] * 26],
    "Humanoid": [1.4, *[0.0] * 44],
    "InvertedPendulum": [0.0] * 4,
}
BOUNDS = [  # task, index, a value just inside, a value just outside
    ("Hopper-v5", 0, 0.701, 0.699),
    ("Hopper-v4", 1, 0.199, 0.201),
    ("gymnasium.envs.mujoco:Hopper-v12", 1, -0.199, -0.201),
    *[("Hopper-v5", i, sign * 99.9, sign * 100.1) for i in (2, 5, 10) for sign in (1, -1)],
    ("Walker2d-v5", 0, 0.801, 0.799),
    ("Walker2d-v5", 0, 1.999, 2.001),
    ("Walker2d-v5", 1, 0.999, 1.001),
    ("Ant-v5", 0, 0.201, 0.199),
    ("Ant-v5", 0, 0.999, 1.001),
    ("Ant-v5", 26, 1e6, np.inf),
    ("Humanoid-v5", 0, 1.001, 0.999),
    ("Humanoid-v5", 0, 1.999, 2.001),
    ("InvertedPendulum-v5", 1, 0.199, 0.201),
    ("InvertedPendulum-v5", 1, -0.199, -0.201),
    ("InvertedPendulum-v5", 3, 1e6, np.inf),
]


@pytest.mark.parametrize("env_id", TASKS)
def test_conditions_are_those_of_the_environments(env_id):
    """Over 500 random steps the model's condition says when a task ends."""
    args, env, rng = mbpo.Args(env_id=env_id), mbpo.make_env(env_id), np.random.default_rng(0)
    terminates, over, ends = mbpo.termination_function(args), True, 0
    for i in range(500):
        if over:
            obs, _ = env.reset(seed=i)
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, _, terminated, truncated, _ = env.step(action)
        mbpo.check_termination(terminates, args, obs, action, next_obs, terminated)
        said = terminates(*map(torch.as_tensor, (obs, action, next_obs)))
        assert bool(said) == terminated
        obs, over, ends = next_obs, terminated or truncated, ends + terminated
    assert (ends > 0) == (env_id.split("-")[0] in ALL_HEALTHY)


@pytest.mark.parametrize(("env_id", "index", "inside", "outside"), BOUNDS)
def test_every_bound_is_where_the_task_has_it(env_id, index, inside, outside):
    """A state just inside goes on; the same just outside, or where it is NaN, has ended."""
    terminates = mbpo.termination_function(mbpo.Args(env_id=env_id))
    states = torch.tensor([ALL_HEALTHY[env_id.split(":")[-1].split("-")[0]]] * 4)
    states[1:, index] = torch.tensor([inside, outside, torch.nan])
    ended = terminates(*[x.view(2, 2, -1) for x in (states, torch.zeros(4, 1), states)])
    assert ended.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Ant-vel-v0", "Ant-v5b", "my.tasks:HopperX-v4"])
def test_a_task_with_no_condition_is_refused_by_its_whole_name(env_id):
    """An id must match to the letter but for its version, and the refusal says how to go on."""
    message = rf"--env-id {env_id}: \S+ is not in this file's HEALTHY: .*--never-terminates"
    with pytest.raises(mbpo.InputError, match=message):
        mbpo.termination_function(mbpo.Args(env_id=env_id))


@pytest.mark.parametrize(
    ("env_id", "said"), [("Hopper-v5", True), ("dmc/hopper-hop", False), ("Pusher-v5", False)]
)
def test_tasks_that_never_end(env_id, said):
    """Said so, of dm_control or listed so: no state ends them, whatever it is."""
    args, states = mbpo.Args(env_id=env_id, never_terminates=said), torch.full((2, 4, 3), torch.nan)
    ended = mbpo.termination_function(args)(states, states[..., :1], states)
    assert ended.dtype == torch.bool
    assert ended.tolist() == [[False] * 4] * 2
