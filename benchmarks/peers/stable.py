"""SAC of stable-baselines3 and of sbx (JAX), which have one interface: train() of 20 updates."""

import os
from functools import partial
from importlib import import_module

import numpy as np
from peers.serve import BATCH, FILLED, UPDATES, Sized, serve, start
from stable_baselines3.common.logger import configure

SETTING = start()
os.environ["JAX_PLATFORMS"] = SETTING.device
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes most of a GPU's memory
device = "cpu" if SETTING.who == "sbx" else SETTING.device  # where torch is
sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "buffer_size": FILLED}
library = import_module(SETTING.who.replace("-", "_"))
agent = library.SAC("MlpPolicy", Sized(SETTING.obs, SETTING.action), device=device, **sizes)
agent.set_logger(configure(None, []))
buffer, random = agent.replay_buffer, np.random.default_rng(0)
for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
    array[:] = random.standard_normal(array.shape, np.float32).clip(-1, 1)
buffer.full = True
update = partial(agent.train, gradient_steps=UPDATES, batch_size=BATCH)
serve("sbx-rl" if SETTING.who == "sbx" else SETTING.who, UPDATES, update)
