"""The numbers that each script learned by when its runs were recorded: see golden.json."""

import json
from pathlib import Path

import pytest
import torch
from helpers_model import CPU, A, S, random_batch, seeded
from helpers_run import SCRIPTS
from torch.utils._pytree import tree_leaves, tree_map

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def filled(params, seed: int):
    """The parameters with made-up numbers, of the size that networks start with."""
    generator = seeded(seed)

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
    agent = script.init_agent(S, A, 0.3, CPU)
    agent["actor"]["params"] = filled(agent["actor"]["params"], 1)
    agent["critic"]["params"] = filled(agent["critic"]["params"], 2)
    agent["target"] = filled(agent["target"], 3)
    torch.manual_seed(0)
    for _ in range(100):
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
    learner = script.adam_init(params, CPU)
    torch.manual_seed(0)
    data = random_batch(300)
    data = data._replace(reward=0.1 * data.obs[:, 0], next_obs=data.obs + 0.1 * data.next_obs)

    def update(learner, x, y):
        new, loss = script.model_update(learner, x, y, args)
        learner.update(new)
        return loss

    model, fit = script.fit_ensemble(learner, data, 100, update, args, seeded(5))
    mean, std = script.predict(model, data.obs[:50], data.action[:50], args)
    return {
        "loss": float(fit["loss"]),
        "layers": norms(model["learner"]["params"]["layers"]),
        "max_log_var": model["learner"]["params"]["max_log_var"].tolist(),
        "elites": model["elites"].tolist(),
        "mean": norms(mean.unbind(-1)),
        "std": norms(std.unbind(-1)),
    }


CASES = [(script, "sac", sac_numbers) for script in SCRIPTS]
CASES += [(script, script.__name__, model_numbers) for script in SCRIPTS[1:]]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("script", "part", "numbers"), CASES)
def test_a_script_learns_as_it_did(script, part, numbers):
    """By SAC, and its model by a fit, from fixed weights and data: equal to nine digits."""
    assert GOLDEN["version"] == script.VERSION  # which is raised with the numbers
    learned = numbers(script)
    assert learned.keys() == GOLDEN[part].keys()
    for name, value in learned.items():
        assert value == pytest.approx(GOLDEN[part][name], rel=1e-9, abs=1e-9), name
