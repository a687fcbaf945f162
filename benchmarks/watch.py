"""Plays what runs have learned: evaluates and films a saved policy, or several side by side.

    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --episodes 1
    python benchmarks/watch.py RUN RUN RUN --gif film.gif

A RUN holds checkpoint.pt. Without --seed its episodes are the first that training evaluates at the
step that was saved; each is filmed as an .mp4 of its own, in the task's own time. With --gif the
first is shown instead, of all runs at once from one seed, so that it begins alike, in one animated
picture of at most 2 MB (.gif, .webp or .png).
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import gymnasium as gym
import numpy as np
import tyro
from common import ROOT, InputError, load_script, read_policy, run_tool
from PIL import Image, ImageDraw

MOST = 2_000_000  # bytes of an animated picture
SIZE = 200, 150  # pixels of a run in it


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    episodes: int = 3  # how many
    seed: int | None = None  # of the episodes; by default the run's
    video: Path | None = None  # folder of the films; by default RUN/watch
    gif: Path | None = None  # file of one animated picture of all runs
    seconds: float = 10.0  # of the task's time that it shows


class Frames(gym.Wrapper):
    """Keeps a picture of every so many steps of an episode, up to a last one."""

    def __init__(self, env: gym.Env, every: int, last: float):
        super().__init__(env)
        self.every, self.last, self.steps, self.frames = every, last, 0, []

    def step(self, action: np.ndarray) -> tuple:
        if self.steps % self.every == 0 and self.steps < self.last:
            self.frames.append(Image.fromarray(self.env.render()).resize(SIZE))
        self.steps += 1
        return self.env.step(action)


class Run:
    """A run whose policy is saved: its script, settings, step, environment, seconds of a step."""

    def __init__(self, folder: Path):
        saved = read_policy(folder)
        self.folder, self.settings, self.step = folder, saved["settings"], saved["progress"]["step"]
        name = Path(self.settings["script"]).name
        files = [file for file in (ROOT / name, ROOT / "build" / name) if file.is_file()]
        if not files:
            raise InputError(f"{folder} was made by {name}, which is not in {ROOT} or its build/")
        self.script = load_script(files[0])
        self.policy = self.script.load_policy(folder)
        self.env = self.script.make_env(self.settings["env_id"], render=True)
        self.dt = getattr(self.env.unwrapped, "dt", None) or 1 / 30

    def play(self, env: gym.Env, seed: int, episode: int) -> float:
        """The return of an episode, as training evaluates it, in its environment in wrappers."""
        obs, _ = env.reset(seed=self.script.derive_seed(seed, 1, self.step, episode))
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(self.policy(obs))
            total, over = total + reward, terminated or truncated
        return total


def film(run: Run, options: Options) -> None:
    """Prints the returns of a run's episodes, and films them."""
    seed = run.settings["seed"] if options.seed is None else options.seed
    folder = options.video or run.folder / "watch"
    how = {"name_prefix": f"step-{run.step}", "fps": round(1 / run.dt)}
    try:
        env = gym.wrappers.RecordVideo(run.env, str(folder), lambda episode: True, **how)
    except gym.error.DependencyNotInstalled:
        raise InputError("a video needs moviepy: pip install -e '.[benchmarks]'") from None
    returns = [run.play(env, seed, i) for i in range(options.episodes)]
    env.close()
    print(*(f"episode {i}  return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
    print(f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}; written to {folder}")


def animate(runs: list[Run], options: Options) -> None:
    """Writes a picture of one episode of all runs, ten frames a second, or fewer to make it fit."""
    if len(alike := {(run.settings["env_id"], run.step) for run in runs}) > 1:
        raise InputError(f"--gif: these runs are not of one task and step: {sorted(alike)}")
    seed = runs[0].settings["seed"] if options.seed is None else options.seed
    every, strips = max(1, round(0.1 / runs[0].dt)), []
    for run in runs:
        env = Frames(run.env, every, options.seconds / run.dt)
        said = f"return {run.play(env, seed, 0):.0f}"
        print(f"{run.folder}  {said}")
        for frame in env.frames:
            text = f"{run.settings['exp_name']}, step {run.step:,}\n{said}"
            ImageDraw.Draw(frame).text((4, 2), text, "white", stroke_width=1, stroke_fill="black")
        strips.append(env.frames)
    longest = max(map(len, strips))  # who has fallen stays as it is
    strips = [frames + frames[-1:] * (longest - len(frames)) for frames in strips]
    frames = [Image.fromarray(np.hstack([*map(np.asarray, x)])) for x in zip(*strips, strict=True)]
    kind, data = options.gif.suffix[1:].upper(), b""
    if kind != "WEBP":  # a palette, without dithering, takes a third of the bytes
        frames = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    for n in (1, 2, 4, 8, 16):  # every n-th frame
        file = io.BytesIO()
        how = {"append_images": frames[n::n], "duration": round(1000 * n * every * run.dt)}
        frames[0].save(file, kind, save_all=True, loop=0, **how)
        if len(data := file.getvalue()) <= MOST:
            break
    options.gif.write_bytes(data)
    print(f"{len(frames[::n])} frames, {len(data):,} bytes: {options.gif}")


def watch(options: Options) -> None:
    """Films each run, or all of them in one picture."""
    if not options.runs or options.episodes < 1 or (options.seed or 0) < 0 or options.seconds <= 0:
        raise InputError("name a run; --episodes and --seconds must be above 0, --seed 0 or more")
    if options.gif and options.gif.suffix not in (".gif", ".webp", ".png"):
        raise InputError(f"--gif must end with .gif, .webp or .png, not {options.gif}")
    runs = [Run(folder) for folder in options.runs]
    if options.gif:
        return animate(runs, options)
    for run in runs:
        film(run, options)


if __name__ == "__main__":
    run_tool(watch, Options, __doc__)
