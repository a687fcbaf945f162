"""How throughput.py asks a contender: a process that does one thing, told by its command line.

For every line on stdin, a number of seconds, it does that for so long; it answers, in JSON on
stdout, with the version of its package and how much it did per second. In between it does nothing.
What goes wrong ends it, with the reason in the last line of stderr.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from torch.utils.benchmark import Timer

BATCH, UPDATES, FILLED = 256, 20, 100_000  # transitions per update, updates per step, in the buffer


class Sized(gym.Env):
    """An environment that has nothing but the sizes asked for."""

    def __init__(self, obs: int, action: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action,), np.float32)


def start() -> SimpleNamespace:
    """What the command line says: kind, task, who, env_id, obs and action (sizes), device."""
    sys.stdout = sys.stderr  # what libraries print is no answer
    return SimpleNamespace(**json.loads(sys.argv[1]))


def serve(package: str, amount: int, once: Callable[[], object]) -> None:
    """Serves a function that does so much in a call."""
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    for seconds in sys.stdin:
        found = timer.blocked_autorange(min_run_time=float(seconds))
        answer = {"version": version(package), "rate": amount / found.mean}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)
