"""mbrl-lib's SAC, ensemble and rollouts, called as in its mbpo.py, with the sizes of ours."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
from mbrl.env.termination_fns import no_termination
from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
from mbrl.planning.sac_wrapper import SACAgent
from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
from mbrl.util import ReplayBuffer
from mbrl.util.replay_buffer import BootstrapIterator
from peers.serve import BATCH, FILLED, UPDATES, Sized, serve, start

SETTING = start()
OBS, ACTION, DEVICE = SETTING.obs, SETTING.action, torch.device(SETTING.device)
SPACES = Sized(OBS, ACTION)


def filled(rows: int) -> ReplayBuffer:
    """A buffer full of random transitions that go on."""
    buffer, random = ReplayBuffer(rows, (OBS,), (ACTION,)), np.random.default_rng(0)
    parts = [random.standard_normal((rows, n), np.float32).clip(-1, 1) for n in (OBS, ACTION, OBS)]
    ends = np.zeros(rows, bool)
    buffer.add_batch(*parts, random.standard_normal(rows, np.float32), ends, ends)
    return buffer


def sac_agent() -> SAC:
    """The library's settings for MBPO, with the target entropy and the hidden layers of ours."""
    args = {"gamma": 0.99, "tau": 0.005, "alpha": 0.2, "policy": "Gaussian", "lr": 3e-4}
    args |= {"target_update_interval": 1, "automatic_entropy_tuning": True, "hidden_size": 256}
    args |= {"target_entropy": -ACTION / 2, "device": DEVICE}
    return SAC(OBS, SPACES.action_space, SimpleNamespace(**args))


def ensemble() -> OneDTransitionRewardModel:
    """Seven networks of four layers of 200, of which five are elites, with scaled inputs."""
    sizes = {"ensemble_size": 7, "num_layers": 4, "hid_size": 200}
    how = {"propagation_method": "random_model", "activation_fn_cfg": {"_target_": "torch.nn.SiLU"}}
    net = GaussianMLP(OBS + ACTION, OBS + 1, DEVICE, **sizes, **how)
    return OneDTransitionRewardModel(net, target_is_delta=True, normalize=True, num_elites=5)


def sac():
    """20 updates of SAC."""
    update = partial(sac_agent().update_parameters, filled(FILLED), BATCH, reverse_mask=True)
    return UPDATES, lambda: [update(updates=i) for i in range(UPDATES)]


def model():
    """An epoch of ModelTrainer.train(), without its evaluation: 32 updates of the ensemble."""
    net, data = ensemble(), filled(32 * BATCH).get_all()
    net.update_normalizer(data)
    batches = BootstrapIterator(data, BATCH, 7, shuffle_each_epoch=True)
    optimizer = ModelTrainer(net, optim_lr=1e-3, weight_decay=1e-5).optimizer
    return 32, lambda: [net.update(batch, optimizer) for batch in batches]


def rollout():
    """400 branches of one step, from the real buffer to the synthetic one."""
    net, memory, synthetic = ensemble(), filled(FILLED), filled(400_000)
    net.update_normalizer(memory.get_all())
    net.set_elite(range(5))
    world, agent = ModelEnv(SPACES, net, no_termination), SACAgent(sac_agent())
    given = world, memory, agent, synthetic, True, 1, 400
    return 400, lambda: rollout_model_and_populate_sac_buffer(*given)


serve("mbrl", *{"sac": sac, "model": model, "rollout": rollout}[SETTING.kind]())
