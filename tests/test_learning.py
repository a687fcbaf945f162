"""Every script learns a real task of the DeepMind Control Suite within a minute or two."""

import gymnasium as gym
import numpy as np
import pytest
import shimmy  # noqa: F401  # registers the suite
from helpers_run import SCRIPTS

SETTINGS = {
    "env_id": "dmc/cartpole-swingup",
    "seed": 1,
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
    """A pole that hangs is swung up: the mean return of the last two evaluations is above 20.

    Seeds 1, 2 and 3 reached sac 43, 35, 30; mbpo 29, 40, 29; mbpo_ftfl 36, 36, 28 and
    mbpo_residual_ablation 31, 38, 31. Broken on purpose, with seed 1: critics without the reward
    in their target 0, 0, 0 and 2; a model that predicts no reward 0, 0 and 2 of mbpo, mbpo_ftfl
    and mbpo_residual_ablation; one that says s' = s 4, 6 and 4. The seed is fixed, as seed 3 would
    prove little: its first policy has 26 without learning (seed 1: 14, seed 2: 1), and mbpo without
    predicted rewards 29 at the end (sac without rewards 13, mbpo_ftfl with s' = s 10).
    """
    coarse = {"control_timestep": 0.05}  # seconds: 200 steps an episode, instead of 1,000
    kwargs = gym.spec("dm_control/cartpole-swingup-v0").kwargs
    monkeypatch.setitem(kwargs, "environment_kwargs", coarse)
    monkeypatch.setattr(script.mlp, "__defaults__", (64,))  # units of actor and critics
    settings = SETTINGS | ({} if script.__name__ == "sac" else MODEL)
    rows = script.train(script.Args(**settings, run_root=str(tmp_path)))["evaluations"][1:]
    returns = [float(row.split(",")[1]) for row in rows]
    assert returns[0] < 20
    assert np.mean(returns[-2:]) > 20, returns
