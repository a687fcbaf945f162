"""The ablation's four cells: two of them are the other scripts, bit for bit."""

import itertools

import pytest
from helpers_model import assert_equal, flat
from helpers_run import Outcome, small

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation as ablation

SETTINGS = {"env_id": "Hopper-v5", "total_timesteps": 120, "learning_starts": 80}
SETTINGS |= {"updates_per_step": 2, "model_hidden": 32, "model_train_frequency": 20}
SETTINGS |= {"model_first_updates": 40, "model_updates": 20, "rollouts_per_step": 20}
SETTINGS |= {"rollout_schedule": (90, 110, 1, 3), "eval_frequency": 60, "eval_episodes": 1}
CELLS = {  # by name: the script, and its options (targets at unit scale, predicts s' - s)
    "mbpo": (mbpo, {}),
    "raw, residual": (ablation, {"normalize_targets": False, "predict_residual": True}),
    "ftfl": (mbpo_ftfl, {}),
    "scaled, absolute": (ablation, {"normalize_targets": True, "predict_residual": False}),
    "scaled, residual": (ablation, {}),
    "raw, absolute": (ablation, {"normalize_targets": False, "predict_residual": False}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name of the cell: its run, and the tensors of its checkpoint."""
    results = {}
    for name, (script, options) in CELLS.items():
        root = str(tmp_path_factory.mktemp("runs"))
        settings = small("mbpo", device="cpu", run_root=root) | SETTINGS | options
        outcome = Outcome(script, settings)
        parts = {part: outcome.saved[part] for part in ("agent", "model", "generator")}
        parts |= {"buffer": outcome.rows, "synthetic": outcome.synthetic}
        results[name] = outcome, flat(parts)
    return results


def test_two_cells_are_the_other_scripts_bit_for_bit(runs):
    """Agent, model, both buffers, random numbers and evaluations are the very same.

    They come from three fits, 82 SAC updates and rollouts of up to three steps.
    """
    for cell, script in [("raw, residual", "mbpo"), ("scaled, absolute", "ftfl")]:
        (outcome, tensors), (expected, expected_tensors) = runs[cell], runs[script]
        assert (outcome.updates, outcome.fitted) == (41 * 2, 40 + 2 * 20)
        assert len(outcome.synthetic) > 41 * 20
        assert len(outcome.evaluations) == 3
        assert outcome.evaluations == expected.evaluations
        assert_equal(tensors, expected_tensors)


def test_one_repair_alone_is_another_method(runs):
    """No two of the cells have the same agent or model; only scaled targets have a scaler."""
    cells = [name for name, (script, _) in CELLS.items() if script is ablation]
    for one, other in itertools.combinations(cells, 2):
        for name in ("/agent/actor/params/0/0", "/model/learner/params/layers/0/0", "/synthetic"):
            assert not runs[one][1][name].equal(runs[other][1][name]), (one, other, name)
    scaled = {name for name, (_, tensors) in runs.items() if "/model/targets/0" in tensors}
    assert scaled == {"ftfl", "scaled, absolute", "scaled, residual"}
