"""Products of float32: as exact as float32 is, unless a flag says otherwise."""

import pytest
import torch
from helpers_run import SCRIPTS, small

import sac


@pytest.fixture
def told(monkeypatch):
    """What PyTorch is told about precision, in order; as it was afterwards."""
    calls, tell = [], torch.set_float32_matmul_precision
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda name: (calls.append(name), tell(name))
    )
    yield calls
    tell("highest")


def brief(tmp_path, script: str, **changes) -> dict:
    """Settings of a run that ends before it learns."""
    return small(script, run_root=str(tmp_path), total_timesteps=3, eval_frequency=0) | changes


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_products_are_exact_by_default(script, tmp_path, told):
    """After a run, numbers that bfloat16 or TF32 would round are multiplied as they are."""
    script.train(script.Args(**brief(tmp_path, script.__name__)))
    x = torch.full((256, 256), 1 + 2**-12)
    assert (x @ x).min() == 256 * (1 + 2**-12) ** 2
    assert told[0] == "medium"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_flag_counts_where_products_are_not_exact(precision, tmp_path, told, monkeypatch):
    """On hardware that rounds (here: a probe that it has rounded), the flag has the last word."""
    monkeypatch.setattr(torch, "full", lambda shape, value, device: torch.ones(shape))
    sac.train(sac.Args(**brief(tmp_path, "sac", matmul_precision=precision)))
    assert told == ["medium", precision]
