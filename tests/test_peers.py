"""The ensemble against mbrl-lib's, with our weights; skipped where package mbrl is missing."""

import pytest
import torch
from helpers_model import CPU, A, S, assert_close
from torch.utils._pytree import tree_leaves

import mbpo

pytest.importorskip(
    "mbrl", reason="pip install --no-deps mbrl==0.2.0, and see benchmarks/README.md"
)


def make_pair(members: int = 5):
    """Our parameters, with biases and bounds away from their start, and theirs with the same."""
    from mbrl.models import GaussianMLP

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
def test_prediction_loss_and_gradient_are_theirs_and_our_weight_decay():
    """Also where a log variance meets a bound; the decay is what they leave to Adam."""
    params, theirs = make_pair()
    x, y = torch.randn(5, 40, S + A), torch.randn(5, 40, S + 1)
    mean, log_var = mbpo.ensemble(params, x)
    assert_close((mean, log_var), tuple(each.detach() for each in theirs(x)))
    for bound in (params["max_log_var"], params["min_log_var"]):
        assert (log_var - bound).abs().min() < 1e-3
    learner, loss = mbpo.model_update(mbpo.adam_init(params, CPU), x, y, mbpo.Args())
    expected, _ = theirs.loss(x, y)
    weights = parameters(theirs)[:-2:2]
    for rate, weight in zip((2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), weights, strict=True):
        expected = expected + rate / 2 * weight.square().sum()
    expected.backward()
    assert_close(loss, expected.detach())
    m = learner["m"]  # a tenth of the gradient, after the first step
    moments = m["layers"], m["max_log_var"], m["min_log_var"]
    for mine, parameter in zip(tree_leaves(moments), parameters(theirs), strict=True):
        assert_close(mine, 0.1 * parameter.grad.reshape(mine.shape))
