"""Evaluates a run's saved policy on deterministic episodes, and films them.

    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --episodes 1

Without --seed these are the first episodes that training evaluates at the step of the checkpoint.
Each episode is an .mp4 of its own, in the task's own time.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, InputError, load_script, load_task, run_tool


@dataclass
class Options:
    run: tyro.conf.Positional[Path]  # folder of a run
    episodes: int = 3  # how many
    seed: int | None = None  # of the episodes; by default the run's
    video: Path | None = None  # folder of the videos; by default RUN/watch


def open_run(run: Path) -> tuple:
    """A run's script, as a module, its Args, agent and step; InputError if there is none."""
    if not (file := run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds no checkpoint.pt: no run, or one that has saved nothing yet")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        settings, agent, step = saved["settings"], saved["agent"], saved["progress"][0]
        name = Path(settings["script"]).name
    except Exception:  # torch.load has no error of its own
        raise InputError(f"{file} is damaged or cut short: name another run") from None
    if not (ROOT / name).is_file():
        raise InputError(f"{file} was written by {name}, which is not in {ROOT}")
    script = load_script(name)
    known = settings.keys() & {field.name for field in fields(script.Args)}
    return script, script.Args(**{name: settings[name] for name in known}), agent, step


def watch(options: Options) -> None:
    """Prints the returns of the episodes and films them."""
    if options.episodes < 1 or (options.seed or 0) < 0:
        raise InputError("--episodes must be at least 1, and --seed 0 or more")
    script, args, agent, step = open_run(options.run)
    seed = args.seed if options.seed is None else options.seed
    args = replace(args, eval_episodes=options.episodes, seed=seed)
    load_task(args.env_id)
    env = script.make_env(args.env_id, render=True)
    dims = env.observation_space.shape[0], env.action_space.shape[0]  # S, A
    nets = {"actor": script.mlp(dims[0], 2 * dims[1]), "critic": script.Critic(*dims)}
    try:
        for part, net in nets.items():
            net.load_state_dict(agent[part]["params"])
    except (KeyError, RuntimeError):
        raise InputError(f"{options.run} is of another version of {script.__name__}.py") from None
    folder = options.video or options.run / "watch"
    interval = getattr(env.unwrapped, "dt", None)  # seconds
    how = {"name_prefix": f"step-{step}", "fps": round(1 / interval) if interval else None}
    try:
        env = gym.wrappers.RecordVideo(env, str(folder), lambda episode: True, **how)
    except gym.error.DependencyNotInstalled:
        raise InputError("a video needs moviepy: pip install -e '.[benchmarks]'") from None
    unpack = script.ReplayBuffer(1, *dims, torch.device("cpu")).unpack
    returns, _ = script.evaluate(env, agent, nets, args, step, unpack)
    env.close()
    print(*(f"episode {i}  return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
    print(f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}; videos in {folder}")


if __name__ == "__main__":
    run_tool(watch, Options, __doc__)
