"""Every script learns to balance a pole, on the real task and within minutes."""

import pytest
from helpers_run import SCRIPTS


def learn(script, root) -> list[float]:
    """Evaluation returns, every 500 steps, of a short run on InvertedPendulum (1000: solved)."""
    settings = {
        "env_id": "InvertedPendulum-v5",
        "learning_starts": 500,
        "total_timesteps": 2000,
        "updates_per_step": 5,
        "policy_lr": 1e-3,
        "q_lr": 1e-3,
        "target_entropy": -0.05,  # as in the original MBPO code
        "eval_frequency": 500,
        "eval_episodes": 3,
        "checkpoint_frequency": 0,
        "run_root": str(root),
    }
    if script.__name__ != "sac":
        settings |= {"total_timesteps": 4500, "model_first_updates": 200, "model_updates": 200}
        settings |= {"ensemble_size": 5, "num_elites": 3, "model_hidden": 100}
    rows = script.train(script.Args(**settings))["evaluations"][1:]
    return [float(row.split(",")[1]) for row in rows]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_learns(script, tmp_path):
    """From a pole that falls at once (under 50 steps of 1000), a run gets to one that stands."""
    returns = learn(script, tmp_path)
    assert returns[0] < 50
    assert max(returns) > 500
