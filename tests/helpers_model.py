"""What the tests of networks, buffers and models share: sizes, random transitions, comparisons."""

import torch

import sac

S, A = 5, 3  # dimensions of the made-up task's states and actions
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> dict:
    """Where random numbers come from, as the scripts pass it on."""
    return {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}


def random_batch(*shape: int) -> sac.Batch:
    """Random transitions of any batch shape, a third of which ended the episode."""
    obs, action = torch.randn(*shape, S), torch.rand(*shape, A) * 2 - 1
    next_obs, terminated = torch.randn(*shape, S), (torch.rand(shape) < 1 / 3).to(obs.dtype)
    return sac.Batch(obs, action, torch.randn(shape), next_obs, terminated)


def flat(tree, prefix: str = "") -> dict:
    """The tensors of nested dicts and tuples, by path."""
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
