"""How throughput.py speaks with a contender, and how all that is measured here is timed.

A request is a line of JSON on stdin. {"task": "sac"} sets a task up and does it twice; the answer,
a line on stdout, tells the package's version and the seconds that this took, most of which are
compilation. {"task": "sac", "seconds": 3} goes on with it for so long; the answer has what was done
and the seconds it took. What goes wrong is {"error": ...}. In between, the contender does nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import torch
from torch.utils.benchmark import Timer

BATCH, UPDATES, FILLED = 256, 20, 100_000  # transitions per update, updates per step, in the buffer


def timed(once: Callable[[], int], seconds: float) -> tuple[int, float]:
    """How much was done, and in how many seconds; `once` returns how much it does in a call."""
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=seconds)
    return once() * found.number_per_run * len(found.raw_times), sum(found.raw_times)


class Sized(gym.Env):
    """An environment of the sizes asked for, which is only reset."""

    def __init__(self, obs: int, action: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action,), np.float32)

    def reset(self, **_):
        return np.zeros(self.observation_space.shape, np.float32), {}


def setting() -> dict:
    """What the command line says: env_id, obs, action (sizes of the two), device, ..."""
    return json.loads(sys.argv[1])


def channel() -> tuple[Iterator[dict], Callable]:
    """The requests, and a function that answers one; what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return map(json.loads, sys.stdin), lambda **fields: print(json.dumps(fields), file=out, flush=1)


def serve(setups: dict[str, Callable], package: str) -> None:
    """Serves tasks: each setup returns a function that does some units, and says how many."""
    requests, answer = channel()
    tasks = {}
    for request in requests:
        name, begin = request["task"], time.perf_counter()
        try:
            if "seconds" in request:
                count, took = timed(tasks[name], request["seconds"])
            else:
                tasks[name] = setups[name]()
                tasks[name](), tasks[name]()
                count, took = 0, time.perf_counter() - begin
            answer(count=count, seconds=took, version=version(package))
        except Exception as error:  # whatever a library raises
            answer(error=repr(error).splitlines()[0])
