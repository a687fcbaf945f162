"""What the tests of whole runs share: the scripts, small settings, comparisons, TensorBoard."""

import dataclasses
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation
import sac

ROOT = Path(__file__).parents[1]
SCRIPTS = [sac, mbpo, mbpo_ftfl, mbpo_residual_ablation]
NAMES = [script.__name__ for script in SCRIPTS]
SMALL = {"env_id": "InvertedPendulum-v5", "total_timesteps": 80, "learning_starts": 40}
SMALL |= {"batch_size": 32, "updates_per_step": 1, "buffer_size": 1000, "eval_frequency": 40}
SMALL |= {"eval_episodes": 2, "compile": False}
SMALL_MODEL = {"ensemble_size": 3, "num_elites": 2, "model_hidden": 16, "model_first_updates": 30}
SMALL_MODEL |= {"model_updates": 5, "rollouts_per_step": 10}


def small(script: str, **changes) -> dict:
    """Settings of a run of a second or less."""
    return SMALL | ({} if script == "sac" else SMALL_MODEL) | changes


def flags(settings: dict) -> list[str]:
    """The settings as the command line spells them."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def fields(script) -> dict:
    """The flags of a script, and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(script.Args)}


def folder_of(root: Path, script: str, env_id: str = "InvertedPendulum-v5", seed: int = 1) -> Path:
    """The folder of a run under its root."""
    return Path(root, f"{env_id.replace('/', '-').replace(':', '-')}__{script}__{seed}")


def read_checkpoint(folder: Path) -> dict:
    """What a checkpoint holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def alter(folder: Path, change) -> None:
    """Changes what a checkpoint holds."""
    saved = read_checkpoint(folder)
    change(saved)
    torch.save(saved, folder / "checkpoint.pt")


def saved_step(folder: Path) -> int:
    """The step up to which a run is saved."""
    return read_checkpoint(folder)["progress"]["step"]


def read_evaluations(folder: Path) -> list[list[str]]:
    """The lines of eval.csv, the header too, without the column of seconds."""
    return [line.split(",")[:-1] for line in (folder / "eval.csv").read_text().splitlines()]


class Outcome:
    """A finished run: what train returned, its folder, evaluations and checkpoint."""

    def __init__(self, script, settings: dict):
        args = script.Args(**settings)
        self.result = script.train(args)
        self.precision = torch.get_float32_matmul_precision()
        self.folder = folder_of(args.run_root, args.exp_name, args.env_id, args.seed)
        self.evaluations = read_evaluations(self.folder)[1:] if args.eval_frequency else None
        self.saved = read_checkpoint(self.folder) if args.checkpoint_frequency else None
        if self.saved:
            self.step, self.agent = self.saved["progress"]["step"], self.saved["agent"]
            self.rows, self.updates = self.saved["buffer"]["rows"], self.agent["actor"]["t"]
        if self.saved and "model" in self.saved:
            self.model, self.synthetic = self.saved["model"], self.saved["synthetic"]["rows"]
            self.learner, self.fitted = self.model["learner"], self.model["learner"]["t"]


class Cut(BaseException):
    """The power goes: nothing is closed or cleaned up."""


@contextmanager
def at_step(script, step: int, act):
    """Has something done in a step of a script's runs, before the environment's step."""
    check = script.check_finite

    def check_finite(now, **quantities):
        check(now, **quantities)
        if now == step and "action" in quantities:
            act()

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(script, "check_finite", check_finite)
        yield


def cut(script, step: int, **settings) -> None:
    """Trains until the power goes in a step."""

    def power_goes():
        raise Cut

    with at_step(script, step, power_goes), pytest.raises(Cut):
        script.train(script.Args(**settings))
    time.sleep(1)  # the files of TensorBoard's curves are in the order of their seconds


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of the files."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def same(one, other) -> bool:
    """Whether two nests of dictionaries, lists and tensors are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def same_learning(one: dict, other: dict) -> bool:
    """Whether two checkpoints are equal, but for settings, evaluations and the clock."""
    parts = one.keys() - {"settings", "progress"}
    if one.keys() != other.keys() or one["progress"]["step"] != other["progress"]["step"]:
        return False
    return all(same(one[part], other[part]) for part in parts)


def one_error(stderr: str) -> str:
    """The only line of stderr, which must begin with `error: `."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]
