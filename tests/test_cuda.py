"""On a GPU, where nothing is promised to the bit, every script trains, is saved and goes on."""

import math

import pytest
import torch
from helpers_model import check_updates_in_place
from helpers_run import SCRIPTS, folder_of, read_checkpoint, read_evaluations, small

import mbpo_ftfl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_trains_on_a_gpu(script, tmp_path):
    """Compiled, with CUDA graphs; on the CPU it goes on from there."""
    settings = small(script.__name__, compile=True, device="cuda", run_root=str(tmp_path))
    script.train(script.Args(**settings))
    folder = folder_of(tmp_path, script.__name__)
    saved = read_checkpoint(folder)
    assert saved["agent"]["actor"]["t"] == 41
    assert saved["agent"]["actor"]["t"].device.type == "cuda"
    more = settings | {"device": "cpu", "resume": True, "total_timesteps": 120}
    script.train(script.Args(**more))
    assert [row[0] for row in read_evaluations(folder)[1:]] == ["0", "40", "80", "120"]
    assert all(math.isfinite(float(row[1])) for row in read_evaluations(folder)[1:])


def test_updates_as_cuda_graphs_are_the_eager_ones():
    """SAC's and the model's, in exact products: eight in a row end alike, but for rounding.

    A graph's first two warm it up and record it, the others replay it. With inputs or a state of
    an update before, losses would be others altogether; where a gradient is nearly zero, rounding
    may change a parameter by an Adam step of 3e-4.
    """
    torch.manual_seed(0)
    mbpo_ftfl.set_up_torch(mbpo_ftfl.Args(compile=False), torch.device("cuda"))
    check_updates_in_place(mbpo_ftfl, True, "cuda", 8, rtol=1e-3, atol=3e-4)
