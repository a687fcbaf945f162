"""Plays what runs have learned, and films it: one picture, all runs side by side.

    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3
    python benchmarks/watch.py RUN RUN RUN --film film.gif

A RUN holds checkpoint.pt. Without --seed its episodes are the first that training evaluates at the
step that was saved. The film shows the first, as an animated .gif, .webp or .png of at most 2 MB.
"""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import gymnasium as gym
import numpy as np
import tyro
from common import InputError, load_script, run_tool
from PIL import Image, ImageDraw

MOST = 2_000_000  # bytes of a film
SIZE = 200, 150  # pixels of a run in it


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    episodes: int = 3  # how many
    seed: int | None = None  # of the episodes; by default the run's
    film: Path | None = None  # file of an animated picture
    seconds: float = 10.0  # of the task's time that it shows


def play(run: dict, policy: Callable, env: gym.Env, seed: int, seconds: float) -> tuple:
    """Return of an episode, as training evaluates it; pictures of its first seconds."""
    obs, _ = env.reset(seed=seed)
    dt = getattr(env.unwrapped, "dt", None) or 1 / 30
    total, over, frames, step = 0.0, False, [], 0
    while not over:
        if step * dt < seconds and step % max(1, round(0.1 / dt)) == 0:
            frames.append(Image.fromarray(env.render()).resize(SIZE))
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, over, step = total + reward, terminated or truncated, step + 1
    text = f"{run['settings']['exp_name']}, step {run['progress']['step']}\nreturn {total:.0f}"
    for frame in frames:
        ImageDraw.Draw(frame).text((4, 2), text, "white", stroke_width=1, stroke_fill="black")
    return total, frames


def write_film(strips: list[list], file: Path) -> None:
    """Writes pictures of runs beside each other, and fewer a second if they do not fit."""
    longest = max(map(len, strips))  # who has fallen stays as it is
    strips = [frames + frames[-1:] * (longest - len(frames)) for frames in strips]
    frames = [Image.fromarray(np.hstack([*map(np.asarray, x)])) for x in zip(*strips, strict=True)]
    kind, data = file.suffix[1:], None  # a palette, without dithering, takes a third of the bytes
    frames = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    for n in (1, 2, 4, 8, 16):  # every n-th frame
        if data is None or data.tell() > MOST:
            data, how = io.BytesIO(), {"append_images": frames[n::n], "duration": 100 * n}
            frames[0].save(data, kind, save_all=True, loop=0, **how)
    file.write_bytes(data.getvalue())


def watch(options: Options) -> None:
    """Prints the returns of episodes of each run, and films the first ones."""
    if not options.runs or options.episodes < 1 or (options.seed or 0) < 0 or options.seconds <= 0:
        raise InputError("name a run; --episodes and --seconds must be above 0, --seed 0 or more")
    if options.film and options.film.suffix not in (".gif", ".webp", ".png"):
        raise InputError(f"--film must end with .gif, .webp or .png, not {options.film}")
    script, strips = load_script("mbpo.py"), []  # acts as any of the scripts does
    runs = [script.read_checkpoint(folder) for folder in options.runs]
    if not all({"settings", "progress", "agent"} <= run.keys() for run in runs):
        raise InputError("a checkpoint.pt here is not one of these scripts")
    alike = {(run["settings"]["env_id"], run["progress"]["step"]) for run in runs}
    if options.film and len(alike) > 1:
        raise InputError(f"--film: these runs are not of one task and step: {sorted(alike)}")
    for folder, run in zip(options.runs, runs, strict=True):
        policy = script.load_policy(folder)
        env = script.make_env(run["settings"]["env_id"], bool(options.film))
        seed = run["settings"]["seed"] if options.seed is None else options.seed
        numbers = [(seed, 1, run["progress"]["step"], i) for i in range(options.episodes)]
        seeds = [script.derive_seed(*each) for each in numbers]
        filmed = options.seconds if options.film else 0
        plays = [play(run, policy, env, x, filmed * (i == 0)) for i, x in enumerate(seeds)]
        returns = [total for total, _ in plays]
        strips.append(plays[0][1])
        lines = [f"episode {i}  return {total:.2f}" for i, total in enumerate(returns)]
        print(folder, *lines, f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}", sep="\n")
    if options.film:
        write_film(strips, options.film)


if __name__ == "__main__":
    run_tool(watch, Options, __doc__)
