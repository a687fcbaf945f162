"""Every script learns a task of which chance, the best return, and the way there are known."""

import gymnasium as gym
import numpy as np
import pytest
from helpers_run import SCRIPTS

STEPS = 30  # of an episode


class Steer(gym.Env):
    """A point (x, y) moves by 0.2 a, and is paid 1 less its distance from (0, 0)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-1, 1, 2)
        return self.point.astype(np.float32), {}

    def step(self, action):
        self.point = np.clip(self.point + 0.2 * np.asarray(action), -2, 2)
        return self.point.astype(np.float32), 1 - np.linalg.norm(self.point), False, False, {}


@pytest.fixture(autouse=True)
def steer(monkeypatch):
    """Makes the task known to Gymnasium for one test."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("Steer-v0", Steer, max_episode_steps=STEPS)


def learn(script, root, seed: int = 1) -> list[float]:
    """Mean evaluation returns of a run, the first before any training."""
    settings = {
        "env_id": "Steer-v0",
        "seed": seed,
        "learning_starts": 500,
        "total_timesteps": 1200,
        "eval_frequency": 1200,
        "gamma": 0.9,
        "policy_lr": 1e-3,
        "q_lr": 1e-3,
        "tau": 0.02,
        "alpha": 0.1,
        "updates_per_step": 1,
        "batch_size": 128,
        "buffer_size": 2000,
        "checkpoint_frequency": 0,
        "compile": False,
        "run_root": str(root),
    }
    if script.__name__ != "sac":
        settings |= {"never_terminates": True, "ensemble_size": 3, "num_elites": 2}
        settings |= {
            "model_patience": 1000,
            "model_lr": 3e-3,
            "model_hidden": 64,
            "model_max_updates": 500,
            "rollouts_per_step": 40,
        }
    rows = script.train(script.Args(**settings))["evaluations"][1:]
    return [float(row.split(",")[1]) for row in rows]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_learns(script, tmp_path):
    """From below 15 of at most 30 (7 for doing nothing), a run gets above 23."""
    before, after = learn(script, tmp_path)
    assert before < 15
    assert after > 23
