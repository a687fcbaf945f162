"""What the tests of networks, buffers and models share: sizes, random transitions, comparisons."""

import copy
from functools import partial

import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import sac

S, A = 5, 3  # dimensions of the made-up task's states and actions
CPU = torch.device("cpu")
assert_equal = partial(assert_close, rtol=0, atol=0)


def seeded(seed: int = 0) -> torch.Generator:
    """Where random numbers come from, as the scripts pass it on."""
    return torch.Generator().manual_seed(seed)


def random_batch(*shape: int) -> sac.Batch:
    """Random transitions of any batch shape, a third of which ended the episode."""
    obs, action = torch.randn(*shape, S), torch.rand(*shape, A) * 2 - 1
    next_obs, terminated = torch.randn(*shape, S), (torch.rand(shape) < 1 / 3).to(obs.dtype)
    return sac.Batch(obs, action, torch.randn(shape), next_obs, terminated)


def flat(tree, prefix: str = "") -> dict:
    """The tensors of nested dicts, lists and tuples, by path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: x for key, part in items for k, x in flat(part, f"{prefix}/{key}").items()}


def check_updates_in_place(script, compiled: bool, device: str, updates: int, **tolerance) -> None:
    """SAC's and the model's updates are pure; in place, a state gets what they return, each time.

    Both begin with the same state, and the pure ones, which are not compiled, go on by themselves.
    """
    args, device = script.Args(compile=compiled), torch.device(device)
    params = script.init_ensemble(4, S + A, S + 1, 8)
    cases = [
        (script.sac_update, script.init_agent(S, A, 0.3, device)),
        (script.model_update, script.adam_init(params, device)),
    ]
    torch.compiler.reset()
    for update, state in cases:
        tree_map(torch._dynamo.mark_static_address, state)
        in_place, pure = script.compiled_update(update, args), copy.deepcopy(state)
        for _ in range(updates):
            inputs = random_batch(32), torch.randn(2, 32, A)
            if update is script.model_update:
                inputs = torch.randn(4, 32, S + A), torch.randn(4, 32, S + 1)
            inputs = tree_map(lambda x: x.to(device), inputs)
            before, kept = pure, copy.deepcopy((pure, inputs))
            pure, expected = update(before, *inputs, args)
            assert_equal((before, inputs), kept)
            pairs = zip(tree_leaves(before), tree_leaves(pure), strict=True)
            assert not any(torch.equal(old, new) for old, new in pairs)
            metrics = tree_map(torch.clone, in_place(state, *inputs))
            assert_close((state, metrics), (pure, expected), **tolerance)
    torch.compiler.reset()
