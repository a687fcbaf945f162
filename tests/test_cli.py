"""The command line, what a run writes, and the tasks it can be given."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from helpers_run import (
    ROOT,
    SCRIPTS,
    fields,
    flags,
    folder_of,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same,
    small,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mbpo
import mbpo_residual_ablation
import sac

OTHER = "mps" if torch.cuda.is_available() else "cuda"  # a device that is not here
HERE = "test_cli:Made-v0"  # a task of this file
one_of_each = pytest.mark.parametrize("script", [sac, mbpo], ids=["sac", "mbpo"])

BAD = [  # flags, and what the line must say
    ("--env-id dmc/walker-rum", "did you mean dmc/walker-run"),
    ("--env-id walker-run", "dmc/walker-run"),
    ("--env-id Hopper", "did you mean Hopper-v5"),
    ("--env-id NoSuchEnv-v0", "NoSuchEnv-v0: no such task"),
    ("--env-id no_such_module:Point-v0", "No module named 'no_such_module'"),
    ("--env-id CartPole-v1", "not Discrete"),
    ("--env-id dmc/lqr-lqr_2_1", "needs bounded Box actions"),
    ("--total-timesteps 0", "--total-timesteps must be a whole number, at least 1, not 0"),
    ("--total-timesteps 39", "--total-timesteps must be at least --learning-starts, not 39"),
    ("--gamma nan", "--gamma must be above 0 and at most 1, not nan"),
    ("--tau 1.5", "--tau must be above 0 and at most 1, not 1.5"),
    ("--policy-lr 0", "--policy-lr must be above 0 and finite, not 0.0"),
    ("--q-lr inf", "--q-lr must be above 0 and finite, not inf"),
    ("--seed -1", "--seed must be from 0 to 2^63 - 1, not -1"),
    ("--seed 9223372036854775808", "--seed must be from 0 to 2^63 - 1, not 9223372036854775808"),
    (f"--device {OTHER}", "--device must be one that is here (c"),
    ("--buffer-size 1000000000000", "replay buffer"),
]
BAD_MODEL = [
    ("--num-elites 9", "--num-elites must be from 1 to --ensemble-size, not 9"),
    ("--model-patience 0", "--model-patience must be at least 1, not 0"),
    ("--real-ratio 1", "--real-ratio must be at least 0 and below 1, not 1.0"),
    ("--batch-size 16 --real-ratio 0.05", "--batch-size must be 1 / --real-ratio or more, not 16"),
    ("--holdout-ratio 1", "--holdout-ratio must be above 0 and below 1, not 1.0"),
    ("--learning-starts 4", "--learning-starts must be"),
    ("--buffer-size 4", "--buffer-size must be"),
    ("--rollout-schedule 10 5 1 1", "--rollout-schedule must be START < END, FROM, TO > 0"),
    ("--rollout-schedule 0 1 0 1", "--rollout-schedule must be START < END, FROM, TO > 0"),
    ("--rollouts-per-step 1000000000", "replay buffer"),
    ("--env-id HumanoidStandup-v5", "--never-terminates"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_input_is_one_line(words, said, refused, tmp_path):
    """What can't be done ends before anything is written, with a line that says why."""
    (tmp_path / "file").write_text("in the way")
    assert said in refused(sac, [*flags(small("sac")), *words.format(root=tmp_path).split()])


@pytest.mark.parametrize(("words", "said"), BAD_MODEL)
def test_bad_input_of_the_model_is_one_line(words, said, refused):
    """The same for what only the scripts with a model have."""
    assert said in refused(mbpo, [*flags(small("mbpo")), *words.split()])


def test_an_unknown_flag_is_named(main, tmp_path):
    """A flag that a script doesn't have ends it with exit code 2."""
    code, _, err = main(sac, ["--no-such-flag", "3"])
    assert code == 2
    assert "--no-such-flag" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def memory_of(size: int):
    """os.sysconf of a machine with so many bytes of memory."""
    ask, known = os.sysconf, {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}
    return lambda name: known[name] if name in known else ask(name)


def test_buffers_are_counted_together(refused, main, monkeypatch):
    """Two replay buffers that fit one by one, but not together, are refused."""
    words = flags(small("mbpo", env_id="InvertedPendulum-v5", buffer_size=10_000))
    size = 2 * 10_000 * 4 * (4 + 1 + 1 + 4 + 1)  # 10 rollouts per step make one as large
    monkeypatch.setattr(os, "sysconf", memory_of(size - 1))
    assert "replay buffers" in refused(mbpo, words)
    monkeypatch.setattr(os, "sysconf", memory_of(size))
    assert main(mbpo, words)[0] == 0


def test_a_package_that_is_missing_is_named(refused, monkeypatch):
    """--track needs wandb and --capture-video moviepy; the line says so."""
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "moviepy" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = flags(small("sac"))
    assert "pip install moviepy" in refused(sac, [*words, "--capture-video"])
    assert "pip install wandb" in refused(sac, [*words, "--track"])


def test_a_renderer_that_is_missing_is_named(refused, monkeypatch):
    """--capture-video fails at once where nothing can be rendered."""

    def fail(*_):
        raise RuntimeError("no OpenGL\nsecond line")

    find = importlib.util.find_spec
    present = lambda name, *rest: name == "moviepy" or find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", present)
    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_env.MujocoEnv.render", fail)
    line = refused(sac, [*flags(small("sac")), "--capture-video"])
    assert "no OpenGL; try MUJOCO_GL=egl" in line


def test_a_task_that_renders_needs_opengl(refused, monkeypatch):
    """quadruped-escape draws its ground; where there is no OpenGL, one line says what to set."""

    def fail(*_):
        raise RuntimeError("no OpenGL rendering backend")

    monkeypatch.setattr("dm_control.mujoco.Physics.contexts", property(fail))
    line = refused(sac, flags(small("sac", env_id="dmc/quadruped-escape")))
    assert "no OpenGL rendering backend; " in line
    assert "MUJOCO_GL" in line


class Made(PendulumEnv):
    """Pendulum, in which something can be wrong from some step on."""

    fault, after, done = "", 0, 0

    def reset(self, **options):
        obs, info = super().reset(**options)
        return obs if self.fault == "reset" else (obs, info)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        type(self).done += 1
        if self.done > self.after and self.fault == "observation":
            obs = obs * np.nan
        if self.done > self.after and self.fault == "reward":
            reward = np.nan
        if self.fault == "step":
            return obs, reward, terminated, info
        return obs, reward, terminated, truncated, info


class Spaces(gym.Env):
    """A task of made-up spaces that does nothing."""

    def __init__(self, observations, actions, **_):
        self.observation_space, self.action_space = observations, actions


gym.register("Made-v0", Made, max_episode_steps=20)


@pytest.fixture
def fault(monkeypatch):
    """Makes the task of this file a faulty one."""

    def of(name: str, after: int = 0) -> None:
        monkeypatch.setattr(Made, "fault", name)
        monkeypatch.setattr(Made, "after", after)
        monkeypatch.setattr(Made, "done", 0)

    return of


def test_a_task_of_ones_own(run, tmp_path):
    """A module beside the script registers a task, by an id that the scripts don't know."""
    (tmp_path / "my_env.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gym.register('Point-v0', PendulumEnv, max_episode_steps=20)\n"
    )
    shutil.copy(ROOT / "sac.py", tmp_path)
    words = flags(small("sac", env_id="my_env:Point-v0"))
    command = [sys.executable, "sac.py", *words]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    folder = folder_of(tmp_path / "runs", "sac", "my_env:Point-v0")
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80"]


def test_a_model_must_know_when_a_task_of_ones_own_ends(main, refused, monkeypatch):
    """It is told so with a flag, or with a condition in HEALTHY."""
    words = flags(small("mbpo", env_id=HERE))
    line = refused(mbpo, words)
    assert "--never-terminates" in line
    assert "HEALTHY" in line
    assert main(mbpo, [*words, "--never-terminates"])[0] == 0
    monkeypatch.setitem(mbpo.HEALTHY, "Made", lambda s, a, n: n[0].abs() < 2)
    assert main(mbpo, [*words, "--exp-name", "healthy"])[0] == 0


@pytest.mark.parametrize(("part", "dims"), [("reset", 3), ("step", 3)])
def test_a_task_of_the_old_interface_is_refused(part, dims, fault, refused, monkeypatch):
    """A reset that returns observations alone, a step that returns 4 values; of any dimensions."""
    reset, step = Made._get_obs, PendulumEnv.__init__

    def init(self, **options):
        step(self, **options)
        self.observation_space = gym.spaces.Box(-9, 9, (dims,))

    monkeypatch.setattr(Made, "_get_obs", lambda self: reset(self)[:dims])
    monkeypatch.setattr(PendulumEnv, "__init__", init)
    fault(part)
    assert "values to unpack" in refused(sac, flags(small("sac", env_id=HERE)))


@pytest.mark.parametrize("dims", [2, 60])
def test_spaces_that_do_not_fit_are_one_line(dims, refused):
    """Images and discrete actions are refused, in one line for spaces of any size."""
    box, bounds = gym.spaces.Box, np.arange(1.0, dims + 1)
    image, vector = box(0, 255, (8, 8, 3), np.uint8), box(-bounds, bounds, dtype=np.float64)
    for name, spaces in {
        f"Image{dims}-v0": (image, box(-1, 1, (1,))),
        f"Discrete{dims}-v0": (vector, gym.spaces.Discrete(3)),
        f"Unbounded{dims}-v0": (vector, box(-np.inf, np.inf, (1,))),
    }.items():
        given = dict(zip(["observations", "actions"], spaces, strict=True))
        gym.register(name, Spaces, kwargs=given)
        assert "needs bounded Box actions" in refused(sac, ["--env-id", name])


def help_of(script) -> dict[str, str]:
    """Definition and comment of every flag, as the source has them."""
    lines = inspect.getsource(script.Args).splitlines()[2:]
    text, name = {}, None
    for line in lines:
        name = name if '"""' in line else line.split(":")[0].strip()
        text[name] = text.get(name, "") + line
    return text


@pytest.mark.parametrize("script", [sac, mbpo_residual_ablation], ids=["sac", "ablation"])
def test_help_names_every_flag(script, main, monkeypatch):
    """--help lists each flag with its explanation and default."""
    monkeypatch.setenv("COLUMNS", "500")
    code, out, _ = main(script, ["--help"])
    shown, explained = " ".join(out.split()), help_of(script)
    assert code == 0
    assert explained.keys() == fields(script).keys()
    for name, source in explained.items():
        assert f"--{name.replace('_', '-')} " in shown.replace(",", " ")
        comment = source.split('"""')[1] if '"""' in source else source.split("# ")[1]
        assert " ".join(comment.split()) in shown, name


def test_scripts_share_flags():
    """A flag has the same default and explanation in all scripts, but for updates per step."""
    base, model, ablation = map(help_of, (sac, mbpo, mbpo_residual_ablation))
    assert {name for name in base if base[name] != model[name]} == {"updates_per_step"}
    assert fields(sac)["updates_per_step"] == 1
    assert fields(mbpo)["updates_per_step"] == 20
    assert {name: ablation[name] for name in model} == model
    assert ablation.keys() - model.keys() == {"normalize_targets", "predict_residual"}


class Outcome:
    """A finished run: what train returned, its folder and its checkpoint."""

    def __init__(self, script, settings: dict):
        self.result = script.train(script.Args(**settings))
        args = script.Args(**settings)
        self.folder = folder_of(args.run_root, args.exp_name, args.env_id, args.seed)
        self.saved = None
        if (self.folder / "checkpoint.pt").exists():
            self.saved = read_checkpoint(self.folder)
            self.rows, self.step = self.saved["rows"], self.saved["progress"][0]
            self.model = self.saved.get("model")

    @property
    def learner(self) -> dict:
        return self.model["learner"]

    @property
    def evaluations(self) -> list[list[str]]:
        return read_evaluations(self.folder)


def brief(script: str, **changes) -> dict:
    """Settings of a small run that learns for 20 steps."""
    return small(script, **({"total_timesteps": 60} | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small run of a script that all flags are flipped from, made once."""
    made = {}

    def of(script) -> Outcome:
        name = script.__name__
        if name not in made:
            made[name] = Outcome(script, brief(name, run_root=str(tmp_path_factory.mktemp(name))))
        return made[name]

    return of


def learns_otherwise(new, old):
    return not same(new.saved["agent"], old.saved["agent"]) and len(new.rows) == len(old.rows)


def models_otherwise(new, old):
    return not same(new.learner["params"], old.learner["params"])


def is_the_same(new, old):
    return same(new.saved["agent"], old.saved["agent"]) and same(new.rows, old.rows)


FLIPPED = {  # of each flag: the settings to change, and what must hold of the new and the old run
    "env_id": ({"env_id": "Hopper-v5"}, lambda new, old: new.rows.shape[1] == 11 + 3 + 1 + 11 + 1),
    "seed": (
        {"seed": 2},
        lambda new, old: new.folder.name.endswith("__2") and not same(new.rows[:9], old.rows[:9]),
    ),
    "total_timesteps": ({"total_timesteps": 70}, lambda new, old: new.step == len(new.rows) == 70),
    "learning_starts": ({"learning_starts": 50}, learns_otherwise),
    "updates_per_step": (
        {"updates_per_step": 2},
        lambda new, old: new.saved["agent"]["actor"]["t"] == 2 * old.saved["agent"]["actor"]["t"],
    ),
    "batch_size": ({"batch_size": 20}, learns_otherwise),
    "gamma": ({"gamma": 0.5}, learns_otherwise),
    "tau": ({"tau": 0.5}, learns_otherwise),
    "policy_lr": ({"policy_lr": 1e-2}, learns_otherwise),
    "q_lr": ({"q_lr": 1e-2}, learns_otherwise),
    "autotune": (
        {"autotune": False},
        lambda new, old: new.saved["agent"]["temperature"]["params"]["log_alpha"] == 0,
    ),
    "alpha": ({"alpha": 0.5}, learns_otherwise),
    "target_entropy": ({"target_entropy": 3.0}, learns_otherwise),
    "buffer_size": (
        {"buffer_size": 50},
        lambda new, old: len(new.rows) == 50 and new.saved["added"] == 60,
    ),
    "eval_frequency": (
        {"eval_frequency": 20},
        lambda new, old: [row[0] for row in new.evaluations[1:]] == ["0", "20", "40", "60"],
    ),
    "eval_episodes": (
        {"eval_episodes": 3},
        lambda new, old: {row[-1] for row in new.evaluations[1:]} == {"3"},
    ),
    "checkpoint_frequency": ({"checkpoint_frequency": 0}, lambda new, old: new.saved is None),
    "run_root": ({}, lambda new, old: new.folder.parent != old.folder.parent),
    "exp_name": ({"exp_name": "other"}, lambda new, old: "v5__other__1" in new.folder.name),
    "device": ({"device": "cpu"}, is_the_same),
    "resume": ({"resume": True}, is_the_same),
    "ensemble_size": (
        {"ensemble_size": 4},
        lambda new, old: len(new.learner["m"]["biases.0"]) == 4,
    ),
    "num_elites": ({"num_elites": 3}, lambda new, old: len(new.model["elites"]) == 3),
    "model_hidden": (
        {"model_hidden": 24},
        lambda new, old: new.learner["params"]["weights.1"].shape == (3, 24, 24),
    ),
    "model_lr": ({"model_lr": 1e-2}, models_otherwise),
    "model_train_frequency": (
        {"model_train_frequency": 8},
        lambda new, old: (new.learner["t"], old.learner["t"]) == (30 + 5 + 5, 30),
    ),
    "model_first_updates": ({"model_first_updates": 3}, lambda new, old: new.learner["t"] == 3),
    "model_updates": (
        {"model_updates": 7, "model_train_frequency": 10},
        lambda new, old: new.learner["t"] == 30 + 7 + 7,
    ),
    "model_patience": ({"model_patience": 1}, lambda new, old: new.learner["t"] not in (0, 30)),
    "holdout_ratio": ({"holdout_ratio": 0.5}, models_otherwise),
    "rollouts_per_step": (
        {"rollouts_per_step": 5},
        lambda new, old: len(new.saved["synthetic"]) == 21 * 5,
    ),
    "rollout_schedule": (
        {"rollout_schedule": (0, 1, 1, 2)},
        lambda new, old: len(new.saved["synthetic"]) > len(old.saved["synthetic"]) == 210,
    ),
    "real_ratio": ({"real_ratio": 0.5}, learns_otherwise),
    "never_terminates": (
        {"env_id": "Pendulum-v1", "never_terminates": True},
        lambda new, old: new.saved["synthetic"][:, -1].sum() == 0,
    ),
    "normalize_targets": (
        {"normalize_targets": False},
        lambda new, old: "targets" in old.model["scaler"] and "targets" not in new.model["scaler"],
    ),
    "predict_residual": ({"predict_residual": False}, models_otherwise),
}
BELOW = {"compile", "track", "capture_video"}


def first_with(name: str):
    """The shortest script that has a flag."""
    return next(s for s in (sac, mbpo, mbpo_residual_ablation) if name in fields(s))


def test_every_flag_has_a_test():
    """The table and the tests below it are about all flags."""
    assert {*FLIPPED, *BELOW} == {name for each in SCRIPTS for name in fields(each)}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flag_does_what_it_says(name, base, tmp_path):
    """With one flag flipped a run ends, and differs from the base run as the flag says."""
    changes, holds = FLIPPED[name]
    script = first_with(name)
    settings = brief(script.__name__, **({"run_root": str(tmp_path)} | changes))
    assert set(changes) <= {name, "env_id", "model_train_frequency"}
    assert holds(Outcome(script, settings), base(script))


def test_without_a_real_share_no_curve_is_of_nothing(tmp_path):
    """--real-ratio 0 trains on the model alone; no curve has a value that is not a number."""
    changes = {"real_ratio": 0.0, "total_timesteps": 1000, "learning_starts": 990}
    outcome = Outcome(mbpo, small("mbpo", run_root=str(tmp_path), eval_frequency=500, **changes))
    scalars = read_scalars(outcome.folder)
    assert "sac/q_loss" in scalars
    assert all(np.isfinite(value) for values in scalars.values() for _, value in values)


WANDB = """
calls = []
def init(**given):
    calls.append(given)
    if fails:
        raise RuntimeError("no API key configured\\nsecond line")
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A package of this name that writes down what it is asked; may fail as without a login."""

    def of(fails: bool):
        folder = tmp_path / "packages"
        folder.mkdir()
        (folder / "wandb.py").write_text(f"fails = {fails}\n{WANDB}")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        return importlib.import_module("wandb")

    yield of
    sys.modules.pop("wandb", None)


def test_track_logs_to_weights_and_biases(wandb, tmp_path):
    """--track starts a run at Weights & Biases, with the settings of the run."""
    asked = wandb(fails=False)
    outcome = Outcome(sac, small("sac", run_root=str(tmp_path / "runs"), track=True))
    (given,) = asked.calls
    assert given["id"] == outcome.folder.name
    assert given["config"]["env_id"] == "InvertedPendulum-v5"
    assert given["sync_tensorboard"] is True


def test_track_without_a_login_is_refused(wandb, refused):
    """It is one line, and no run folder is left behind."""
    wandb(fails=True)
    line = refused(sac, [*flags(small("sac")), "--track"])
    assert "--track: no API key configured" in line
    assert "wandb login" in line


class Drawn(PendulumEnv):
    """Pendulum with small grey pictures."""

    def render(self):
        return np.full((16, 16, 3), 99, np.uint8)


gym.register("Drawn-v0", Drawn, max_episode_steps=20)


def test_capture_video_records_the_first_episode_of_each_evaluation(tmp_path):
    """A file by the step of each evaluation; the run itself stays the same."""
    pytest.importorskip("moviepy")
    settings = small("sac", env_id="test_cli:Drawn-v0", eval_episodes=3)
    filmed = Outcome(sac, settings | {"run_root": str(tmp_path / "on"), "capture_video": True})
    plain = Outcome(sac, settings | {"run_root": str(tmp_path / "off")})
    names = [path.name for path in (filmed.folder / "videos").glob("*.mp4")]
    assert sorted(re.match(r"step-(\d+)-", name)[1] for name in names) == ["0", "40", "80"]
    assert filmed.evaluations == plain.evaluations
    assert same(filmed.saved["agent"], plain.saved["agent"])


@one_of_each
def test_what_a_run_writes(script, tmp_path):
    """Settings, evaluations, a checkpoint and TensorBoard's curves lie in the run's folder."""
    name = script.__name__
    changes = {"total_timesteps": 1000, "learning_starts": 990, "eval_frequency": 500}
    outcome = Outcome(script, small(name, run_root=str(tmp_path), **changes))
    names = {path.name.split(".")[0] for path in outcome.folder.iterdir()}
    assert names == {"args", "checkpoint", "eval", "events"}
    settings = outcome.saved["settings"]
    assert settings["script"] == f"{name}.py"
    assert settings.keys() == fields(script).keys() | {"script", "source"}
    lines = (outcome.folder / "eval.csv").read_text().splitlines()
    assert lines == outcome.result["evaluations"]
    assert lines[0] == "step,mean,std,min,max,episodes,seconds"
    rows = np.array([line.split(",") for line in lines[1:]], dtype=float)
    assert rows[:, 0].tolist() == [0, 500, 1000]
    assert (rows[:, 3] <= rows[:, 1]).all()
    assert (rows[:, 1] <= rows[:, 4]).all()
    assert (np.diff(rows[:, 6]) > 0).all()
    scalars = read_scalars(outcome.folder)
    steps = {tag: [step for step, _ in values] for tag, values in scalars.items()}
    update = {f"sac/{part}" for part in ("q_loss", "q", "actor_loss", "entropy", "alpha")}
    model = {"reward_error", "state_error_mean", "state_error_worst", "reward_share_of_loss"}
    model |= {"change_error_mean", "change_error_worst", "reward_std_ratio"}
    model |= {"loss", "updates", "holdout_mse"}
    if script is not sac:
        assert all(steps.pop(f"model/{part}") == [990] for part in model)
    assert all(steps.pop(tag) == [1000] for tag in update)
    assert steps.pop("eval/return") == steps.pop("eval/critic_bias") == [0, 500, 1000]
    np.testing.assert_allclose([x for _, x in scalars["eval/return"]], rows[:, 1], rtol=1e-4)
    ends = outcome.rows[:, -1].nonzero().flatten() + 1
    assert steps.pop("train/episode_return") == ends.tolist()
    assert steps.pop("train/episode_length") == ends.tolist()
    lengths = [length for _, length in scalars["train/episode_length"]]
    assert lengths == np.diff(ends, prepend=0).tolist()
    assert steps.pop("train/steps_per_second") == [1000]
    assert not steps


def test_tensorboard_has_the_settings(base):
    """As a text of every flag and its value."""
    events = EventAccumulator(str(base(sac).folder)).Reload()
    ((text,),) = [e.tensor_proto.string_val for e in events.Tensors("hyperparameters/text_summary")]
    assert all(name in text.decode() for name in fields(sac))


@one_of_each
def test_progress_on_stdout(script, main, tmp_path):
    """The folder and the device, an evaluation a line with speed and time left, what is saved."""
    code, out, err = main(script, flags(small(script.__name__, eval_frequency=20)))
    first, *lines, last = out.splitlines()
    assert (code, err) == (0, "")
    assert first == f"{folder_of(tmp_path, script.__name__)} on {sac.Args().device}, from step 0"
    shown = r"step +(\d+)  return +-?[\d.]+ \+- [\d.]+(?:  ([\d.]+) steps/s, (\S+) left)?"
    matches = [re.fullmatch(shown, line) for line in lines]
    evaluations = [match.groups() for match in matches if match]
    assert [int(step) for step, *_ in evaluations] == [0, 20, 40, 60, 80]
    assert evaluations[0][1] is None  # nothing is known yet
    assert all(rate for step, rate, _ in evaluations if int(step) > 40)
    assert re.fullmatch("[0:]+", evaluations[-1][2])
    assert "80 steps are done" in last
    assert "checkpoint.pt" in last


def test_progress_between_evaluations(main):
    """Every 1,000 steps there is a line, so that nobody waits for long."""
    changes = {"total_timesteps": 2000, "learning_starts": 990, "eval_frequency": 0}
    code, out, _ = main(sac, flags(small("sac", **changes)))
    steps = {int(step) for step in re.findall(r"^step +(\d+)\b", out, re.MULTILINE)}
    assert code == 0
    assert {1000, 2000} <= steps


def test_the_last_line_names_only_what_is_there(main):
    """Without checkpoints and evaluations it says neither."""
    words = flags(small("sac", checkpoint_frequency=0, eval_frequency=0))
    code, out, _ = main(sac, words)
    assert code == 0
    assert "checkpoint.pt" not in out
    assert "eval.csv" not in out


def test_from_python_nothing_is_warned_of(tmp_path):
    """train(Args(...)) ends without a word on stderr, even with all warnings shown."""
    settings = small("mbpo", run_root=str(tmp_path / "runs"), env_id="dmc/cartpole-balance")
    settings |= {"total_timesteps": 45, "eval_frequency": 0}
    program = f"import mbpo\nmbpo.train(mbpo.Args(**{settings!r}))"
    command = [sys.executable, "-W", "default", "-c", program]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "Warning" not in child.stderr


def test_every_domain_of_the_suite_can_be_made():
    """Observations are flat, actions in [-1, 1]; of lqr alone, actions have no bounds."""
    from dm_control import suite

    tasks = {domain: task for domain, task in suite.ALL_TASKS if task != "escape"}
    del tasks["lqr"]
    assert len(tasks) >= 15
    for domain, task in tasks.items():
        env = sac.make_env(f"dmc/{domain}-{task}")
        obs, _ = env.reset(seed=1)
        assert obs.shape == env.observation_space.shape == (obs.size,)
        assert (env.action_space.low == -1).all()
        assert (env.action_space.high == 1).all()
        for _ in range(2):
            obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            assert np.isfinite(obs).all()
            assert np.isfinite(reward)
            assert not terminated
            assert not truncated
        env.close()


@pytest.mark.parametrize(
    ("env_id", "dims"), [("Ant-v5", (27, 8)), ("Humanoid-v5", (45, 17)), ("Hopper-v5", (11, 3))]
)
def test_gym_tasks_have_the_papers_observations(env_id, dims):
    """Ant and Humanoid are cut to positions and velocities."""
    env = sac.make_env(env_id)
    assert (env.observation_space.shape[0], env.action_space.shape[0]) == dims


def test_an_episode_of_the_suite_ends_at_its_time_limit():
    """It is cut after 1,000 steps, and never terminated."""
    env = sac.make_env("dmc/cartpole-balance")
    env.reset(seed=1)
    steps = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(1000)]
    assert steps == [(False, False)] * 999 + [(False, True)]


@pytest.mark.parametrize("env_id", ["dmc/walker-run", "Hopper-v5"])
def test_a_seed_decides_a_trajectory(env_id):
    """The same seed gives the same episode, another one another."""

    def episode(seed):
        env, actions = sac.make_env(env_id), np.random.default_rng(0)
        states = [env.reset(seed=seed)[0]]
        for _ in range(20):
            action = actions.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            states.append(env.step(action)[0])
        return np.array(states)

    assert np.array_equal(episode(3), episode(3))
    assert not np.array_equal(episode(3)[0], episode(4)[0])


def test_actions_are_scaled_to_the_tasks_range():
    """-1 and 1 are the ends of InvertedPendulum's [-3, 3]."""
    for action, expected in [(-1, -3), (0.5, 1.5), (1, 3)]:
        env = sac.make_env("InvertedPendulum-v5")
        env.reset(seed=1)
        env.step(np.array([action], np.float32))
        assert env.unwrapped.data.ctrl[0] == pytest.approx(expected)


def test_evaluations_leave_training_alone(base, tmp_path):
    """With evaluations or none, a run learns the same to the bit."""
    old = base(mbpo)
    new = Outcome(mbpo, brief("mbpo", run_root=str(tmp_path), eval_frequency=0))
    assert not (new.folder / "eval.csv").exists()
    for part in old.saved.keys() - {"settings", "progress"}:
        assert same(new.saved[part], old.saved[part]), part


@pytest.mark.parametrize("part", ["reward", "observation"])
def test_a_number_that_is_not_finite_stops_the_run(part, main, fault):
    """The environment's nan ends the run with a line of the quantity and the step."""
    fault(part, after=2 + 23)  # two steps try the two environments out
    code, _, err = main(sac, flags(small("sac", env_id=HERE, eval_frequency=0)))
    assert code == 1
    assert one_error(err) == f"error: {part} is not finite at step 24: the run stops"


def test_learning_that_diverges_stops_the_run(main):
    """So do losses without bound."""
    code, _, err = main(sac, flags(small("sac", eval_frequency=0, q_lr=1e30)))
    assert code == 1
    assert one_error(err) == "error: actor_loss is not finite at step 41: the run stops"


def test_a_model_that_diverges_stops_the_run(main):
    """And the model's."""
    code, _, err = main(mbpo, flags(small("mbpo", eval_frequency=0, model_lr=1e30)))
    assert code == 1
    assert re.fullmatch(r"error: \w+ is not finite at step 41: the run stops", one_error(err))


def test_without_a_compiler_the_line_says_what_to_do(refused, main, monkeypatch):
    """Nothing is compiled with --no-compile; without it a C++ compiler must be there."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = flags(small("sac"))
    assert "install g++, or give --no-compile" in refused(sac, [*words, "--compile"])
    assert main(sac, words)[::2] == (0, "")


def test_a_run_root_that_cannot_be_is_one_line(main, tmp_path):
    """A file in the folder's place ends the run before it begins."""
    (tmp_path / "file").write_text("in the way")
    words = flags(small("sac", run_root=str(tmp_path / "file" / "below")))
    code, _, err = main(sac, words)
    assert code == 1
    assert str(tmp_path / "file") in one_error(err)
