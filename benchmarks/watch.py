"""Evaluates a run's saved policy on deterministic episodes, and films them.

Without --seed these are the first episodes that training evaluates at the step of the checkpoint.
The video shows every episode in the task's own time, with about 25 frames per second.
"""

import argparse
import os
import sys
import warnings
from contextlib import closing
from dataclasses import fields, replace
from importlib import import_module, util
from pathlib import Path

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import gymnasium as gym
import imageio
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = """examples:
  python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3
  python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --episodes 1 --video walker.gif
  python benchmarks/watch.py runs/dmc-walker-run__mbpo_ftfl__3 --seed 7    other episodes
"""


class InputError(ValueError):
    """What was asked for can't be done; one line says why and what to do."""


class Camera(gym.Wrapper):
    """Sends the frames of all episodes to a video, as many as to see about 25 per second."""

    def __init__(self, env: gym.Env, path: Path):
        super().__init__(env)
        interval = getattr(env.unwrapped, "dt", None) or 1 / env.metadata.get("render_fps", 25)
        self.every = max(1, round(1 / (25 * interval)))  # the interval is in seconds
        shown = self.every * interval  # seconds, of one frame
        gif = path.suffix == ".gif"
        timing = {"duration": 1000 * shown, "loop": 0} if gif else {"fps": 1 / shown}
        self.video, self.bar = imageio.get_writer(path, **timing), tqdm(unit="step", disable=None)

    def film(self) -> None:
        """Adds what is to be seen."""
        self.video.append_data(self.env.render())

    def reset(self, **kwargs) -> tuple:
        """Starts an episode."""
        start, self.steps = self.env.reset(**kwargs), 0
        self.film()
        return start

    def step(self, action: np.ndarray) -> tuple:
        """Takes a step."""
        result, self.steps = self.env.step(action), self.steps + 1
        self.bar.update()
        if self.steps % self.every == 0:
            self.film()
        return result

    def close(self) -> None:
        """Finishes the video."""
        for opened in (self.video, self.bar, self.env):
            opened.close()


def open_run(run: Path) -> tuple:
    """A run's script, as a module, its Args, agent and step; InputError if there is none."""
    file = run / "checkpoint.pt"
    if not run.is_dir():
        raise InputError(f"{run} is no folder: name one of runs/")
    if not file.exists():
        raise InputError(f"{run} holds no checkpoint.pt: no run, or one that has saved nothing yet")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        settings, agent, step = saved["settings"], saved["agent"], saved["progress"][0]
        name = Path(settings["script"]).name
    except Exception:  # torch.load has no error of its own
        raise InputError(f"{file} is damaged or cut short: name another run") from None
    if not (ROOT / name).is_file():
        raise InputError(f"{file} was written by {name}, which is not in {ROOT}")
    sys.path.insert(0, str(ROOT))
    script = import_module(Path(name).stem)
    known = settings.keys() & {field.name for field in fields(script.Args)}
    return script, script.Args(**{name: settings[name] for name in known}), agent, step


def watch(run: Path, episodes: int, seed: int | None, video: Path) -> list[float]:
    """Writes the video and gives the return of each episode; InputError before any file."""
    for wrong, fault in [
        (episodes < 1, f"--episodes must be at least 1, not {episodes}"),
        (seed is not None and seed < 0, f"--seed must be 0 or more, not {seed}"),
        (video.suffix not in (".mp4", ".gif"), f"--video must end in .mp4 or .gif, not {video}"),
        (
            video.suffix == ".mp4" and not util.find_spec("imageio_ffmpeg"),
            "an .mp4 needs moviepy: pip install moviepy, or give --video with a name in .gif",
        ),
    ]:
        if wrong:
            raise InputError(fault)
    script, args, agent, step = open_run(run)
    if not os.access(video.parent, os.W_OK):
        raise InputError(f"--video: {video.parent} is no folder to write to: choose another")
    args = replace(args, eval_episodes=episodes, seed=args.seed if seed is None else seed)
    try:
        env = script.make_env(args.env_id, render=True)
    except script.InputError as error:  # of the registry, of the environment, of the renderer
        raise InputError(str(error)) from None
    dims = env.observation_space.shape[0], env.action_space.shape[0]  # S, A
    nets = {"actor": script.mlp(dims[0], 2 * dims[1]), "critic": script.Critic(*dims)}
    try:
        for part, net in nets.items():
            net.load_state_dict(agent[part]["params"])
    except (KeyError, RuntimeError):
        fault = f"{run} was trained by another version of {script.__name__}.py: train anew"
        raise InputError(fault) from None
    unpack = script.ReplayBuffer(1, *dims, torch.device("cpu")).unpack
    with closing(Camera(env, video)) as camera:
        return script.evaluate(camera, agent, nets, args, step, unpack)[0]


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        raise InputError(f"{message}; --help shows examples")


def main() -> None:
    """Prints the returns of the episodes and films them; bad input is one line and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = Parser(description=__doc__, **layout)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--episodes", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--seed", type=int, help="of the episodes (default: the run's)")
    parser.add_argument("--video", type=Path, help=".mp4 or .gif (default: RUN/watch.mp4)")
    try:
        args = parser.parse_args()
        video = args.video or args.run / "watch.mp4"
        returns = watch(args.run, args.episodes, args.seed, video)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    for i, value in enumerate(returns, 1):
        print(f"episode {i}  return {value:.2f}")
    print(f"mean {np.mean(returns):.2f} +- {np.std(returns):.2f}; {video}")


if __name__ == "__main__":
    main()
