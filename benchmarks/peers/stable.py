"""SAC of stable-baselines3 and of sbx (JAX), which have one interface: their own train()."""

import os
from importlib import import_module

import numpy as np
from peers.serve import BATCH, FILLED, UPDATES, Sized, serve, setting
from stable_baselines3.common.logger import configure

SETTING = setting()
PACKAGE = SETTING["package"]
os.environ["JAX_PLATFORMS"] = SETTING["device"]
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes most of a GPU's memory


def sac():
    """20 updates, as one call of train() with a filled buffer; two hidden layers of 256."""
    device = SETTING["device"] if PACKAGE == "stable_baselines3" else "cpu"  # where torch is
    sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "buffer_size": FILLED}
    env = Sized(SETTING["obs"], SETTING["action"])
    agent = import_module(PACKAGE).SAC("MlpPolicy", env, device=device, **sizes)
    agent.set_logger(configure(None, []))
    buffer, random = agent.replay_buffer, np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        array[:] = random.standard_normal(array.shape, np.float32).clip(-1, 1)
    buffer.full = True

    def once() -> int:
        agent.train(gradient_steps=UPDATES, batch_size=BATCH)
        return UPDATES

    return once


serve({"sac": sac}, {"stable_baselines3": "stable-baselines3", "sbx": "sbx-rl"}[PACKAGE])
