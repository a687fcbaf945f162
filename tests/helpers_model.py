"""What the tests of networks, buffers and models share: sizes, random transitions, comparisons."""

import torch
from torch import nn

import sac

S, A = 5, 3  # dimensions of the made-up task's states and actions
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    """Where random numbers come from, as the scripts pass it on."""
    return torch.Generator().manual_seed(seed)


def random_batch(*shape: int) -> sac.Batch:
    """Random transitions of any batch shape, a third of which ended the episode."""
    obs, action = torch.randn(*shape, S), torch.rand(*shape, A) * 2 - 1
    next_obs, terminated = torch.randn(*shape, S), (torch.rand(shape) < 1 / 3).to(obs.dtype)
    return sac.Batch(obs, action, torch.randn(shape), next_obs, terminated)


def as_module(params: list) -> nn.Sequential:
    """A network of linear layers with ReLU between them, whose weights are copies of these."""
    layers = []
    for weight, bias in params:
        layer = nn.Linear(*weight.shape)
        layer.weight.data.copy_(weight.T)
        layer.bias.data.copy_(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def as_params(module: nn.Sequential) -> list:
    """The parameters of such a network, as the scripts keep them."""
    return [(layer.weight.data.T, layer.bias.data) for layer in module[::2]]


def stack(twins: list) -> list:
    """The parameters of several networks, stacked as the scripts keep them."""
    layers = zip(*twins, strict=True)
    return [
        (torch.stack([w for w, _ in layer]), torch.stack([b[None] for _, b in layer]))
        for layer in layers
    ]


def unstack(params: list) -> list:
    """The parameters of each of several networks that are stacked."""
    return [[(w[i], b[i, 0]) for w, b in params] for i in range(len(params[0][0]))]


def flat(tree, prefix: str = "") -> dict:
    """The tensors of nested dicts, lists and tuples, by path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: x for key, part in items for k, x in flat(part, f"{prefix}/{key}").items()}


def assert_close(actual, expected, **tolerance) -> None:
    """Fails, naming the tensor, if two trees of tensors differ by more than the tolerance."""
    actual, expected = flat(actual), flat(expected)
    assert actual.keys() == expected.keys()
    for path, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[path], msg=lambda m, p=path: f"{p}: {m}", **tolerance
        )


def assert_equal(actual, expected) -> None:
    """The same to the bit."""
    assert_close(actual, expected, rtol=0, atol=0)
