"""Plays what runs have learned, and films it: one picture, all runs side by side.

    python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3
    python benchmarks/watch.py RUN RUN RUN --film film.gif

A RUN holds checkpoint.pt. Without --seed its episodes are the first that training evaluates at the
step that was saved. The film shows the first episode of every run, ten frames a second of the
task's own time, as an animated .gif, .webp or .png of at most 2 MB.
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import numpy as np
import tyro
from common import ROOT, InputError, load_script, read_policy, run_tool
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


class Run:
    """A run whose policy is saved: its settings, the step, and how to play it."""

    def __init__(self, folder: Path, render: bool):
        saved = read_policy(folder)
        self.folder, self.settings, self.step = folder, saved["settings"], saved["progress"]["step"]
        name = Path(self.settings["script"]).name
        files = [file for file in (ROOT / name, ROOT / "build" / name) if file.is_file()]
        if not files:
            raise InputError(f"{folder} was made by {name}, which is not in {ROOT} or its build/")
        self.script = load_script(files[0])
        self.policy = self.script.load_policy(folder)
        self.env = self.script.make_env(self.settings["env_id"], render=render)

    def play(self, seed: int | None, episode: int, seconds: float) -> tuple[float, list]:
        """Return of an episode, as training evaluates it; pictures of its first seconds."""
        seed = self.settings["seed"] if seed is None else seed
        obs, _ = self.env.reset(seed=self.script.derive_seed(seed, 1, self.step, episode))
        dt = getattr(self.env.unwrapped, "dt", None) or 1 / 30
        total, over, frames, step = 0.0, False, [], 0
        while not over:
            if step * dt < seconds and step % max(1, round(0.1 / dt)) == 0:
                frames.append(Image.fromarray(self.env.render()).resize(SIZE))
            obs, reward, terminated, truncated, _ = self.env.step(self.policy(obs))
            total, over, step = total + reward, terminated or truncated, step + 1
        for frame in frames:
            text = f"{self.settings['exp_name']}, step {self.step:,}\nreturn {total:.0f}"
            ImageDraw.Draw(frame).text((4, 2), text, "white", stroke_width=1, stroke_fill="black")
        return total, frames


def write_film(strips: list[list], file: Path) -> None:
    """Writes pictures of runs beside each other, and fewer a second if they do not fit."""
    longest = max(map(len, strips))  # who has fallen stays as it is
    strips = [frames + frames[-1:] * (longest - len(frames)) for frames in strips]
    frames = [Image.fromarray(np.hstack([*map(np.asarray, x)])) for x in zip(*strips, strict=True)]
    kind, data = file.suffix[1:].upper(), None
    if kind != "WEBP":  # a palette, without dithering, takes a third of the bytes
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
    runs, strips = [Run(folder, bool(options.film)) for folder in options.runs], []
    if options.film and len(alike := {(run.settings["env_id"], run.step) for run in runs}) > 1:
        raise InputError(f"--film: these runs are not of one task and step: {sorted(alike)}")
    for run in runs:
        films = [options.seconds if options.film and i == 0 else 0 for i in range(options.episodes)]
        plays = [run.play(options.seed, i, seconds) for i, seconds in enumerate(films)]
        returns = [total for total, _ in plays]
        print(
            run.folder, *(f"episode {i}  return {x:.2f}" for i, x in enumerate(returns)), sep="\n"
        )
        print(f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}")
        strips.append(plays[0][1])
    if options.film:
        write_film(strips, options.film)


if __name__ == "__main__":
    run_tool(watch, Options, __doc__)
