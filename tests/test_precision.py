"""Products of float32: as exact as float32 is, unless a flag says otherwise."""

import pytest
import torch
from helpers_model import CPU

import sac


@pytest.fixture(autouse=True)
def as_before():
    """PyTorch's own precision, after a test too."""
    yield
    torch.set_float32_matmul_precision("highest")


def test_products_are_exact_by_default():
    """Numbers that bfloat16 or TF32 would round are multiplied as they are."""
    sac.setup_torch(sac.Args(compile=False), CPU)
    x = torch.full((256, 256), 1 + 2**-12)
    assert (x @ x).min() == 256 * (1 + 2**-12) ** 2


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_flag_counts_where_products_are_not_exact(precision, monkeypatch):
    """On hardware that rounds (here: a probe that it has rounded), the flag has the last word."""
    monkeypatch.setattr(torch, "full", lambda shape, value, device: torch.ones(shape))
    sac.setup_torch(sac.Args(compile=False, matmul_precision=precision), CPU)
    assert torch.get_float32_matmul_precision() == precision
