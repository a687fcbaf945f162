"""The ensemble against mbrl-lib's, with our weights; skipped where package mbrl is missing."""

import numpy as np
import pytest
import torch
from helpers_model import CPU, A, S, assert_close, random_batch, seeded
from torch.utils._pytree import tree_leaves

import mbpo

pytest.importorskip(
    "mbrl", reason="pip install --no-deps mbrl==0.2.0, and see benchmarks/README.md"
)


@pytest.fixture
def double():
    """Numbers in float64, so that both may be compared to some ten digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_pair(members: int = 5):
    """Our parameters, with biases and bounds away from their start, and theirs with the same."""
    from mbrl.models import GaussianMLP

    torch.manual_seed(0)
    params = mbpo.init_ensemble(members, S + A, S + 1, 12)
    for _, bias in params["layers"]:
        bias.normal_()
    params["layers"][-1][0].mul_(60)  # log variances beyond the bounds, too
    params["max_log_var"].uniform_(0, 1), params["min_log_var"].uniform_(-5, -3)
    config = {"learn_logvar_bounds": True, "activation_fn_cfg": {"_target_": "torch.nn.SiLU"}}
    theirs = GaussianMLP(S + A, S + 1, "cpu", 4, members, 12, **config)
    copies = params["layers"], params["max_log_var"], params["min_log_var"]
    for mine, parameter in zip(tree_leaves(copies), parameters(theirs), strict=True):
        parameter.data.copy_(mine)
    return params, theirs


def parameters(theirs) -> list:
    """Their parameters in the order of ours: weight and bias of each layer, bounds."""
    layers = [*(block[0] for block in theirs.hidden_layers), theirs.mean_and_logvar]
    pairs = [(layer.weight, layer.bias) for layer in layers]
    return [*(x for pair in pairs for x in pair), theirs.max_logvar, theirs.min_logvar]


@pytest.mark.usefixtures("double")
def test_prediction_and_bounds_of_the_log_variance_are_theirs():
    """Mean and softly clamped log variance of every member, also where a bound is met."""
    params, theirs = make_pair()
    x = torch.randn(5, 40, S + A)
    mean, log_var = mbpo.ensemble(params, x)
    with torch.no_grad():
        assert_close((mean, log_var), theirs(x))
    assert (log_var - params["max_log_var"]).abs().min() < 1e-3
    assert (log_var - params["min_log_var"]).abs().min() < 1e-3


@pytest.mark.usefixtures("double")
def test_loss_and_its_gradient_are_theirs_and_our_weight_decay():
    """Their likelihood with its term of the bounds, plus the decay, which they leave to Adam."""
    params, theirs = make_pair()
    x, y = torch.randn(5, 40, S + A), torch.randn(5, 40, S + 1)
    learner, loss = mbpo.model_update(mbpo.adam_init(params, CPU), x, y, mbpo.Args())
    expected, _ = theirs.loss(x, y)
    for rate, (weight, _) in zip((2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), layers(theirs), strict=True):
        expected = expected + rate / 2 * weight.square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    m = learner["m"]  # a tenth of the gradient, after the first step
    moments = m["layers"], m["max_log_var"], m["min_log_var"]
    for mine, parameter in zip(tree_leaves(moments), parameters(theirs), strict=True):
        torch.testing.assert_close(mine, 0.1 * parameter.grad.reshape(mine.shape))


def layers(theirs) -> list:
    """Weight and bias of each of their layers."""
    found = parameters(theirs)[:-2]
    return list(zip(found[::2], found[1::2], strict=True))


def test_elites_are_those_that_their_trainer_chooses():
    """A fit's elites, on its holdout, are the ones of mbrl-lib's validation of the same members."""
    from mbrl.models import ModelTrainer, OneDTransitionRewardModel
    from mbrl.types import TransitionBatch
    from mbrl.util import TransitionIterator

    params, theirs = make_pair()
    data, args = random_batch(300), mbpo.Args(ensemble_size=5, num_elites=3)
    learner = mbpo.adam_init(params, CPU)
    parts = learner, data, 1, lambda *_: torch.tensor(0.0), args, seeded()
    model, metrics = mbpo.fit_ensemble(*parts)
    _, holdout = mbpo.split(300, args, seeded())
    rows = [x[holdout].numpy() for x in data]
    obs, action, reward, next_obs, terminated = rows
    batch = TransitionBatch(obs, action, next_obs, reward, terminated, np.zeros_like(terminated))
    how = {"target_is_delta": True, "normalize": True}
    whole = OneDTransitionRewardModel(theirs, learned_rewards=True, num_elites=3, **how)
    whole.input_normalizer.mean, whole.input_normalizer.std = model["inputs"]
    trainer = ModelTrainer(whole)
    scores = trainer.evaluate(TransitionIterator(batch, 32))
    trainer._maybe_set_best_weights_and_elite(None, scores)
    assert model["elites"].tolist() == list(theirs.elite_models)
    assert metrics["holdout_mse"].item() == pytest.approx(scores[theirs.elite_models].mean().item())
