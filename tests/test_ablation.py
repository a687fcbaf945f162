"""The ablation's four cells: two of them are the other scripts, bit for bit."""

import itertools

import pytest
import torch
from helpers_model import flat

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation as ablation

SETTINGS = {"env_id": "Hopper-v5", "total_timesteps": 120, "learning_starts": 80}
SETTINGS |= {"updates_per_step": 2, "batch_size": 32, "ensemble_size": 3, "num_elites": 2}
SETTINGS |= {"model_hidden": 32, "model_train_frequency": 20, "model_first_updates": 40}
SETTINGS |= {"model_updates": 20, "rollouts_per_step": 20, "rollout_schedule": (90, 110, 1, 3)}
SETTINGS |= {"eval_frequency": 60, "eval_episodes": 1, "device": "cpu", "compile": False}
CELLS = {  # by name: the script, and its options (targets at unit scale, predicts s' - s)
    "mbpo": (mbpo, {}),
    "raw, residual": (ablation, {"normalize_targets": False, "predict_residual": True}),
    "ftfl": (mbpo_ftfl, {}),
    "scaled, absolute": (ablation, {"normalize_targets": True, "predict_residual": False}),
    "scaled, residual": (ablation, {"normalize_targets": True, "predict_residual": True}),
    "raw, absolute": (ablation, {"normalize_targets": False, "predict_residual": False}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By name of the cell: the tensors of its checkpoint, and eval.csv without the seconds."""
    threads, results = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for name, (script, options) in CELLS.items():
        root = tmp_path_factory.mktemp("runs")
        script.train(script.Args(run_root=str(root), **SETTINGS, **options))
        (folder,) = root.iterdir()
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        parts = {name: saved[name] for name in ("agent", "model", "generator")}
        parts |= {name: saved[name]["rows"] for name in ("buffer", "synthetic")}
        lines = (folder / "eval.csv").read_text().splitlines()
        results[name] = flat(parts), [line.rsplit(",", 1)[0] for line in lines]
    torch.set_num_threads(threads)
    return results


def test_runs_reach_what_they_are_compared_in(runs):
    """Three fits, 82 SAC updates, rollouts of up to three steps and three evaluations each."""
    for tensors, evaluations in runs.values():
        assert tensors["/agent/actor/t"] == 41 * 2
        assert tensors["/model/learner/t"] == 40 + 2 * 20
        assert len(tensors["/buffer"]) == 120
        assert len(tensors["/synthetic"]) > 41 * 20
        assert len(evaluations) == 1 + 3


def test_two_cells_are_the_other_scripts_bit_for_bit(runs):
    """Agent, model, both buffers, random numbers and evaluations are the very same."""
    for cell, script in [("raw, residual", "mbpo"), ("scaled, absolute", "ftfl")]:
        (tensors, evaluations), (expected, expected_evaluations) = runs[cell], runs[script]
        assert tensors.keys() == expected.keys()
        assert [path for path in tensors if not torch.equal(tensors[path], expected[path])] == []
        assert evaluations == expected_evaluations


def test_one_repair_alone_is_another_method(runs):
    """No two of the four cells have the same agent, model or synthetic transitions."""
    names = ["/agent/actor/params/0/0", "/model/learner/params/layers/0/0", "/synthetic"]
    cells = [name for name, (script, _) in CELLS.items() if script is ablation]
    for one, other in itertools.combinations(cells, 2):
        for name in names:
            assert not torch.equal(runs[one][0][name], runs[other][0][name]), (one, other, name)


def test_only_scaled_targets_have_a_scaler(runs):
    """The model keeps the targets' mean and deviation where it uses them, and only there."""
    scaled = {name for name, (tensors, _) in runs.items() if "/model/targets/0" in tensors}
    assert scaled == {"ftfl", "scaled, absolute", "scaled, residual"}


def test_default_cell_undoes_one_repair():
    """Without options the ablation scales its targets and predicts s' - s."""
    assert ablation.Args().normalize_targets
    assert ablation.Args().predict_residual
