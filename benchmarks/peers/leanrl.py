"""LeanRL's compiled SAC: its script, run with no environment steps, and its own update functions.

It updates the actor twice after every other update of the critics, so as often as we do.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import torch
from peers.serve import BATCH, FILLED, UPDATES, Sized, serve, setting
from tensordict import TensorDict

SETTING = setting()
OBS, ACTION, DEVICE = SETTING["obs"], SETTING["action"], SETTING["device"]


def sac():
    """20 updates; on a GPU compiled and captured, the fastest that LeanRL offers."""
    gym.register("Sized-v0", partial(Sized, OBS, ACTION))
    sys.modules["wandb"] = SimpleNamespace(init=lambda **_: None)
    words = ["--env-id", "Sized-v0", "--total-timesteps", "0", "--compile"]
    words += ["--cudagraphs"] if DEVICE == "cuda" else ["--no-cuda"]
    sys.argv = ["sac_continuous_action_torchcompile.py", *words]
    script = {"__name__": "__main__", "__file__": SETTING["source"]}
    exec(compile(Path(SETTING["source"]).read_text(), SETTING["source"], "exec"), script)
    sizes = {"observations": OBS, "next_observations": OBS, "actions": ACTION}
    data = {name: torch.randn(FILLED, n).clamp(-1, 1) for name, n in sizes.items()}
    data |= {"rewards": torch.randn(FILLED), "dones": torch.zeros(FILLED, dtype=torch.bool)}
    script["rb"].extend(TensorDict(data, batch_size=FILLED, device=DEVICE))

    def once() -> int:  # as in the script's loop
        for i in range(UPDATES):
            batch = script["rb"].sample(BATCH)
            script["update_main"](batch)
            if i % 2 == 0:
                for _ in range(2):
                    script["update_pol"](batch)
                    script["alpha"].copy_(script["log_alpha"].detach().exp())
            script["qnet_target"].lerp_(script["qnet_params"].data, script["args"].tau)
        return UPDATES

    return once


serve({"sac": sac}, "tensordict")
