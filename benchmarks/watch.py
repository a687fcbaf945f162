"""Evaluates a run's saved policy on deterministic episodes; films them, or asks the model of them.

    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --episodes 1
    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --ahead 100

Without --seed these are the first episodes that training evaluates at the step of the checkpoint.
Each is filmed as an .mp4 of its own, in the task's own time. With --ahead H ahead.csv is written
instead: of every H steps the reward, `real`, and what the saved model expects from the first of
their states on, `model`, the median of 100 rollouts by the same policy, as some may diverge.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from common import ROOT, InputError, load_script, load_task, run_tool

ROLLOUTS = 100  # of the model, from each state that it is asked about


@dataclass
class Options:
    run: tyro.conf.Positional[Path]  # folder of a run
    episodes: int = 3  # how many
    seed: int | None = None  # of the episodes; by default the run's
    video: Path | None = None  # folder of what is written; by default RUN/watch
    ahead: int = 0  # film nothing, but ask the model about so many steps at a time


def open_run(run: Path) -> tuple:
    """A run's script, as a module, its Args and its checkpoint; InputError if there is none."""
    if not (file := run / "checkpoint.pt").exists():
        raise InputError(f"{run} holds no checkpoint.pt: no run, or one that has saved nothing yet")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        settings, _, _ = saved["settings"], saved["agent"], saved["progress"][0]
        name = Path(settings["script"]).name
    except Exception:  # torch.load has no error of its own
        raise InputError(f"{file} is damaged or cut short: name another run") from None
    if not (ROOT / name).is_file():
        raise InputError(f"{file} was written by {name}, which is not in {ROOT}")
    script = load_script(name)
    known = settings.keys() & {field.name for field in fields(script.Args)}
    return script, script.Args(**{name: settings[name] for name in known}), saved


def look_ahead(script, args, saved, nets: dict, episodes: list, unpack, steps) -> pd.DataFrame:
    """Columns episode, step, real, model: the reward of so many steps, and what the model expects.

    Either ends earlier where the task ends episodes, and both at a time limit.
    """

    def step_model(model, actor, obs, choice, noise) -> tuple:
        """model_step without noise in the action."""
        return script.model_step(model, actor, obs, choice, (0.0, noise[1]), nets, args)

    generator, lines = torch.Generator().manual_seed(script.derive_seed(args.seed, 3)), []
    given = saved["model"], saved["agent"]["actor"]["params"]
    how = script.termination_function(args), {"generator": generator, "device": "cpu"}
    for number, episode in enumerate(episodes):
        for step in range(0, len(episode.reward), steps):
            real = episode.reward[step : step + steps]
            batch = script.Batch(*(part[[step] * ROLLOUTS] for part in episode))
            going, rewards = torch.ones(ROLLOUTS), torch.zeros(ROLLOUTS)
            for _ in range(steps if episode.terminated[-1] else len(real)):
                batch = unpack(script.rollout(*given, batch, 1, step_model, *how))
                rewards += going * batch.reward
                going *= 1 - batch.terminated
                batch = batch._replace(obs=batch.next_obs)
            lines.append((number, step, float(real.sum()), float(rewards.nanmedian())))
    return pd.DataFrame(lines, columns=["episode", "step", "real", "model"])


def watch(options: Options) -> None:
    """Prints the returns of the episodes; films them, or writes what the model expects of them."""
    if options.episodes < 1 or min(options.seed or 0, options.ahead) < 0:
        raise InputError("--episodes must be at least 1, and --seed and --ahead 0 or more")
    script, args, saved = open_run(options.run)
    if options.ahead and "elites" not in saved.get("model", {}):
        raise InputError(f"{options.run} has no fitted model to ask: leave out --ahead")
    seed = args.seed if options.seed is None else options.seed
    args = replace(args, eval_episodes=options.episodes, seed=seed)
    load_task(args.env_id)
    env = script.make_env(args.env_id, render=not options.ahead)
    dims = env.observation_space.shape[0], env.action_space.shape[0]  # S, A
    nets = {"actor": script.mlp(dims[0], 2 * dims[1]), "critic": script.Critic(*dims)}
    unpack = script.ReplayBuffer(1, *dims, torch.device("cpu")).unpack
    agent, step, episodes = saved["agent"], saved["progress"][0], []
    try:
        for part, net in nets.items():
            net.load_state_dict(agent[part]["params"])
    except (KeyError, RuntimeError):
        raise InputError(f"{options.run} is of another version of {script.__name__}.py") from None
    folder = options.video or options.run / "watch"
    interval = getattr(env.unwrapped, "dt", None)  # seconds
    how = {"name_prefix": f"step-{step}", "fps": round(1 / interval) if interval else None}
    try:
        if not options.ahead:
            env = gym.wrappers.RecordVideo(env, str(folder), lambda episode: True, **how)
    except gym.error.DependencyNotInstalled:
        raise InputError("a video needs moviepy: pip install -e '.[benchmarks]'") from None

    def keep(rows: torch.Tensor):
        """ReplayBuffer.unpack, as evaluate() calls it with each episode, which it keeps."""
        episodes.append(unpack(rows))
        return episodes[-1]

    returns, _ = script.evaluate(env, agent, nets, args, step, keep)
    env.close()
    print(*(f"episode {i}  return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
    if options.ahead:
        sizes = args.ensemble_size, sum(dims), dims[0] + 1, args.model_hidden
        nets["ensemble"] = script.Ensemble(*sizes)
        table = look_ahead(script, args, saved, nets, episodes, unpack, options.ahead)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / "ahead.csv", index=False, float_format="%.6g")
    print(f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}; written to {folder}")


if __name__ == "__main__":
    run_tool(watch, Options, __doc__)
