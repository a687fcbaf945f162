"""The numbers that each script learned by when its runs were recorded: see golden.json."""

import json
from pathlib import Path

import pytest
import torch
from helpers_model import A, S, random_batch
from helpers_run import SCRIPTS
from torch.utils._pytree import tree_leaves, tree_map

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
UPDATES = 100


@pytest.fixture(autouse=True)
def double():
    """Numbers in float64, so that the order of sums does not show."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def filled(params, seed: int):
    """The parameters with made-up numbers, of the size that networks start with."""
    generator = torch.Generator().manual_seed(seed)

    def fill(p):
        size = 0.5 / max(p.shape[-2:], default=1) ** 0.5
        return torch.randn(p.shape, generator=generator) * size

    return tree_map(fill, params)


def norms(tree) -> list[float]:
    """The norm of every tensor, in order."""
    return [float(leaf.norm()) for leaf in tree_leaves(tree)]


def sac_numbers(script) -> dict:
    """Losses and norms after 100 SAC updates."""
    args = script.Args(policy_lr=1e-3, q_lr=2e-3, tau=0.02, gamma=0.95)
    agent = script.init_agent(S, A, 0.3, torch.device("cpu"))
    agent["actor"]["params"] = filled(agent["actor"]["params"], 1)
    agent["critic"]["params"] = filled(agent["critic"]["params"], 2)
    agent["target"] = filled(agent["target"], 3)
    torch.manual_seed(0)
    for _ in range(UPDATES):
        batch, noise = random_batch(32), torch.randn(2, 32, A)
        agent, metrics = script.sac_update(agent, batch, noise, args)
    parts = {name: norms(agent[name]["params"]) for name in ("actor", "critic", "log_alpha")}
    parts |= {"target": norms(agent["target"])}
    return parts | {name: float(value) for name, value in metrics.items()}


def model_numbers(script) -> dict:
    """The loss, norms and elites after a fit of 100 updates, and what the model then predicts."""
    args = script.Args(ensemble_size=4, num_elites=3, model_hidden=20)
    params = filled(script.init_ensemble(4, S + A, S + 1, 20), 4)
    params |= {"max_log_var": torch.full((S + 1,), 0.5), "min_log_var": torch.full((S + 1,), -5.0)}
    learner = script.adam_init(params, torch.device("cpu"))
    torch.manual_seed(0)
    data = random_batch(300)
    data = data._replace(reward=0.1 * data.obs[:, 0], next_obs=data.obs + 0.1 * data.next_obs)

    def update(learner, x, y):
        new, loss = script.model_update(learner, x, y, args)
        learner.update(new)
        return loss

    generator = torch.Generator().manual_seed(5)
    model, fit = script.fit_ensemble(learner, data, UPDATES, update, args, generator)
    mean, std = script.predict(model, data.obs[:50], data.action[:50], args)
    return {
        "loss": float(fit["loss"]),
        "layers": norms(model["learner"]["params"]["layers"]),
        "max_log_var": model["learner"]["params"]["max_log_var"].tolist(),
        "elites": model["elites"].tolist(),
        "mean": norms(mean.unbind(-1)),
        "std": norms(std.unbind(-1)),
    }


def assert_golden(numbers: dict, expected: dict) -> None:
    """Equal to nine digits."""
    assert numbers.keys() == expected.keys()
    for name, value in numbers.items():
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_sac_learns_as_it_did(script):
    """After 100 updates from fixed weights and batches."""
    assert_golden(sac_numbers(script), GOLDEN["sac"])


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda script: script.__name__)
def test_the_model_learns_as_it_did(script):
    """After a fit of 100 updates from fixed weights and transitions."""
    assert_golden(model_numbers(script), GOLDEN[script.__name__])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_version_is_that_of_the_numbers(script):
    """VERSION and the numbers are changed together."""
    assert GOLDEN["version"] == script.VERSION
