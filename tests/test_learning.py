"""Every script learns a task of the DeepMind Control Suite, on the real task and in a minute."""

import gymnasium as gym
import numpy as np
import pytest
import shimmy  # noqa: F401  # registers the suite
from helpers_run import SCRIPTS

SETTINGS = {
    "env_id": "dmc/cartpole-swingup",
    "learning_starts": 500,
    "total_timesteps": 1250,
    "updates_per_step": 4,
    "batch_size": 128,
    "gamma": 0.98,
    "alpha": 0.1,
    "policy_lr": 1e-3,
    "q_lr": 1e-3,
    "eval_frequency": 250,
    "eval_episodes": 2,
    "checkpoint_frequency": 0,
    "device": "cpu",
}
MODEL = {
    "ensemble_size": 3,
    "num_elites": 2,
    "model_hidden": 100,
    "model_first_updates": 500,
    "model_updates": 100,
    "rollouts_per_step": 100,
    "real_ratio": 0.0,  # what is learned comes from the model alone
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_learns(script, tmp_path, monkeypatch):
    """TODO"""
    coarse = {"control_timestep": 0.05}  # seconds: 200 steps an episode, instead of 1,000
    kwargs = gym.spec("dm_control/cartpole-swingup-v0").kwargs
    monkeypatch.setitem(kwargs, "environment_kwargs", coarse)
    monkeypatch.setattr(script.mlp, "__defaults__", (64,))  # units of actor and critics
    settings = SETTINGS | ({} if script.__name__ == "sac" else MODEL)
    rows = script.train(script.Args(**settings, run_root=str(tmp_path)))["evaluations"][1:]
    returns = [float(row.split(",")[1]) for row in rows]
    assert returns[0] < 20
    assert np.mean(returns[3:]) > 25, returns
