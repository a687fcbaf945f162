"""The command line, what a run writes, and the tasks it can be given."""

import importlib.util
import inspect
import os
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers_run import (
    NAMES,
    SCRIPTS,
    fields,
    flags,
    folder_of,
    listing,
    one_error,
    read_checkpoint,
    read_evaluations,
    read_scalars,
    same,
    small,
)
from torch.utils._pytree import tree_leaves

import mbpo
import sac

WITH_MODEL = SCRIPTS[1:]
DEVICE = "mps" if torch.cuda.is_available() else "cuda"  # one that is not here
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
every_model = pytest.mark.parametrize("script", WITH_MODEL, ids=NAMES[1:])

BAD = [  # flags, and what the line must say
    ("--env-id dmc/walker-rum", "dmc/walker-run"),
    ("--env-id dmc/walker", "dmc/walker-"),
    ("--env-id dmc/", "dmc/walker-run"),
    ("--env-id walker-run", "dmc/walker-run"),
    ("--env-id Hopper-v55", "Hopper-v5 "),
    ("--env-id NoSuchEnv-v0", "NoSuchEnv-v0: no such task"),
    ("--env-id CartPole-v1", "not Discrete"),
    ("--env-id dmc/lqr-lqr_2_1", "actions must be a bounded Box"),
    ("--total-timesteps 0", "--total-timesteps must be at least 1, not 0"),
    ("--learning-starts 0", "--learning-starts must be"),
    ("--batch-size -1", "--batch-size must be at least 1, not -1"),
    ("--gamma nan", "--gamma must be above 0 and at most 1, not nan"),
    ("--tau 1.5", "--tau must be above 0 and at most 1, not 1.5"),
    ("--policy-lr 0", "--policy-lr must be above 0 and finite, not 0.0"),
    ("--q-lr inf", "--q-lr must be above 0 and finite, not inf"),
    ("--target-entropy nan", "--target-entropy must be finite, not nan"),
    ("--seed -1", "--seed must be 0 or more, not -1"),
    (f"--device {DEVICE}", "--device must be one that is here (auto, c"),
    ("--device tpu", "not tpu"),
    ("--matmul-precision low", "--matmul-precision must be highest, high or medium, not low"),
    ("--exp-name a/b", "--exp-name must be a name without /, not a/b"),
    ("--buffer-size 1000000000000", "replay buffer"),
    ("--run-root {root}/file/below", "choose another --run-root"),
    ("--run-root /proc/runs", "choose another --run-root"),
]
BAD_MODEL = [
    ("--num-elites 9", "--num-elites must be from 1 to --ensemble-size, not 9"),
    ("--ensemble-size 0", "--ensemble-size must be at least 1, not 0"),
    ("--real-ratio 1.5", "--real-ratio must be from 0 to 1, not 1.5"),
    ("--holdout-ratio 1", "--holdout-ratio must be above 0 and below 1, not 1.0"),
    ("--holdout-ratio 0", "--holdout-ratio must be above 0 and below 1, not 0.0"),
    ("--learning-starts 4", "--learning-starts must be enough for a holdout, not 4"),
    ("--rollout-schedule 10 5 1 1", "--rollout-schedule must be steps START < END"),
    ("--rollout-schedule 0 1 0 1", "--rollout-schedule must be horizons FROM and TO"),
    ("--rollouts-per-step 1000000000", "replay buffer"),
    ("--env-id HumanoidStandup-v5", "--never-terminates"),
]


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """Calls a script's main in-process, run root in tmp_path; returns exit code, stdout, stderr."""

    def call(script, words: list[str]) -> tuple[int, str, str]:
        if "--run-root" not in words:
            words = [*words, "--run-root", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back at the end
        with pytest.raises(SystemExit) as ending:
            script.main()
        return ending.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(main, tmp_path):
    """Checks that main ends with exit code 2, one line, and nothing written; returns the line."""

    def call(script, words: list[str]) -> str:
        (tmp_path / "file").write_text("in the way")
        before = listing(tmp_path)
        code, out, err = main(script, words)
        assert code == 2
        assert out == ""
        assert listing(tmp_path) == before
        return one_error(err)

    return call


@pytest.mark.parametrize(("words", "said"), BAD)
@pytest.mark.parametrize("script", [sac, mbpo], ids=["sac", "mbpo"])
def test_bad_input_is_one_line(script, words, said, refused, tmp_path):
    """What can't be done ends before anything is written, with a line that says why."""
    base = flags(small(script.__name__))
    assert said in refused(script, [*base, *words.format(root=tmp_path).split()])


@pytest.mark.parametrize(("words", "said"), BAD_MODEL)
@every_model
def test_bad_input_of_the_model_is_one_line(script, words, said, refused):
    """The same for what only the scripts with a model have."""
    assert said in refused(script, [*flags(small(script.__name__)), *words.split()])


@every_script
def test_bad_input_of_a_child(script, run, tmp_path):
    """Run as a command, a script ends the same way."""
    words = flags({"env_id": "dmc/walker-rum", "run_root": tmp_path / "runs"})
    child = run(script.__name__, *words)
    assert child.returncode == 2
    assert "dmc/walker-run" in one_error(child.stderr)
    assert not list(tmp_path.iterdir())


@every_script
def test_an_unknown_flag_is_named(script, main, tmp_path):
    """A flag that a script doesn't have ends it with exit code 2."""
    code, _, err = main(script, ["--no-such-flag", "3"])
    assert code == 2
    assert "--no-such-flag" in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "package"), [("--track", "wandb"), ("--capture-video", "moviepy")]
)
@every_script
def test_a_package_that_is_missing_is_named(script, flag, package, refused, monkeypatch):
    """--track needs wandb and --capture-video moviepy; the line says so."""
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == package else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    line = refused(script, [*flags(small(script.__name__)), flag])
    assert f"{flag} must be off" in line
    assert f"pip install {package}" in line


@every_script
def test_a_renderer_that_is_missing_is_named(script, refused, monkeypatch):
    """--capture-video fails at once where nothing can be rendered."""

    def fail(*_):
        raise RuntimeError("no display\nsecond line")

    find = importlib.util.find_spec
    present = lambda name, *rest: name == "moviepy" or find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", present)
    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_env.MujocoEnv.render", fail)
    line = refused(script, [*flags(small(script.__name__)), "--capture-video"])
    assert "--capture-video: no display; " in line
    assert "MUJOCO_GL" in line


class Made(gym.Env):
    """A task of made-up spaces that does nothing."""

    def __init__(self, observations, actions, **_):
        self.observation_space, self.action_space = observations, actions


@pytest.mark.parametrize("dims", [2, 60])
def test_spaces_that_do_not_fit_are_one_line(dims, refused, monkeypatch):
    """Images and discrete actions are refused, in one line for spaces of any size."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    box, bounds = gym.spaces.Box, np.arange(1.0, dims + 1)
    image, vector = box(0, 255, (8, 8, 3), np.uint8), box(-bounds, bounds, dtype=np.float64)
    for name, spaces in {
        "Image-v0": (image, box(-1, 1, (1,))),
        "Discrete-v0": (vector, gym.spaces.Discrete(3)),
        "Unbounded-v0": (vector, box(-np.inf, np.inf, (1,))),
    }.items():
        gym.register(name, Made, kwargs=dict(zip(["observations", "actions"], spaces, strict=True)))
        assert "actions must be a bounded Box" in refused(sac, ["--env-id", name])


def help_of(script) -> dict[str, str]:
    """Definition and comment of every flag, as the source has them."""
    lines = inspect.getsource(script.Args).splitlines()[2:]
    text, name = {}, None
    for line in lines:
        name = name if '"""' in line else line.split(":")[0].strip()
        text[name] = text.get(name, "") + line
    return text


@every_script
def test_help_names_every_flag(script, main, monkeypatch):
    """--help lists each flag with its explanation and default."""
    monkeypatch.setenv("COLUMNS", "500")
    code, out, _ = main(script, ["--help"])
    shown, explained = " ".join(out.split()), help_of(script)
    assert code == 0
    assert explained.keys() == fields(script).keys()
    for name, source in explained.items():
        assert f"--{name.replace('_', '-')} " in shown.replace(",", " ")
        comment = source.split("# ")[1] if "# " in source else source.split('"""')[1]
        assert comment in shown, name


@pytest.mark.parametrize("script", WITH_MODEL, ids=NAMES[1:])
def test_scripts_share_flags(script):
    """A flag has the same default and explanation in all scripts, but for updates per step."""
    base, other = help_of(sac), help_of(script)
    assert base.keys() <= other.keys()
    assert {name for name in base if base[name] != other[name]} == {"updates_per_step"}
    assert fields(sac)["updates_per_step"] == 1
    assert fields(script)["updates_per_step"] == 20
    model, own = help_of(mbpo), {"normalize_targets", "predict_residual"}
    assert {name: other[name] for name in model} == model
    assert other.keys() - model.keys() == (own if "ablation" in script.__name__ else set())


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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small run of a script that all flags are flipped from, made once."""
    made = {}

    def of(script) -> Outcome:
        name = script.__name__
        if name not in made:
            made[name] = Outcome(script, small(name, run_root=str(tmp_path_factory.mktemp(name))))
        return made[name]

    return of


def learns_otherwise(new, old):
    return not same(new.saved["agent"], old.saved["agent"]) and len(new.rows) == len(old.rows)


def models_otherwise(new, old):
    return not same(new.learner["params"], old.learner["params"])


def is_the_same(new, old):
    return same(new.saved["agent"], old.saved["agent"]) and same(new.rows, old.rows)


def times(new, old) -> float:
    """How many gradient steps the model did for each one of the base run."""
    return float(new.learner["t"] / old.learner["t"])


FLIPPED = {  # of each flag: the settings to change, and what must hold of the new and the old run
    "env_id": ({"env_id": "Hopper-v5"}, lambda new, old: new.rows.shape[1] == 11 + 3 + 1 + 11 + 1),
    "seed": (
        {"seed": 2},
        lambda new, old: new.folder.name.endswith("__2") and not same(new.rows[:9], old.rows[:9]),
    ),
    "total_timesteps": ({"total_timesteps": 90}, lambda new, old: new.step == len(new.rows) == 90),
    "learning_starts": ({"learning_starts": 60}, learns_otherwise),
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
        {"buffer_size": 60},
        lambda new, old: len(new.rows) == 60 and new.saved["added"] == 80,
    ),
    "eval_frequency": (
        {"eval_frequency": 20},
        lambda new, old: [row[0] for row in new.evaluations[1:]] == ["0", "20", "40", "60", "80"],
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
    "overwrite": ({"overwrite": True}, is_the_same),
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
        {"model_train_frequency": 30, "model_patience": 99},
        lambda new, old: new.learner["t"] == 60,
    ),
    "model_max_updates": ({"model_max_updates": 3}, lambda new, old: new.learner["t"] == 3),
    "model_patience": ({"model_patience": 1}, lambda new, old: times(new, old) < 1),
    "holdout_ratio": ({"holdout_ratio": 0.5}, models_otherwise),
    "rollouts_per_step": (
        {"rollouts_per_step": 5},
        lambda new, old: len(new.saved["synthetic"]) == 41 * 5,
    ),
    "rollout_schedule": (
        {"rollout_schedule": (0, 1, 1, 2)},
        lambda new, old: len(new.saved["synthetic"]) > len(old.saved["synthetic"]) == 410,
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
BELOW = {"compile", "track", "wandb_project_name", "wandb_entity", "capture_video"}
ELSEWHERE = {"matmul_precision"}  # in test_precision.py
ROWS = [(script, name) for script in SCRIPTS for name in FLIPPED if name in fields(script)]


@every_script
def test_every_flag_has_a_test(script):
    """The table and the tests below it are about all flags."""
    assert fields(script).keys() <= FLIPPED.keys() | BELOW | ELSEWHERE
    assert {*FLIPPED, *BELOW, *ELSEWHERE} == {name for each in SCRIPTS for name in fields(each)}


@pytest.mark.parametrize(("script", "name"), ROWS, ids=lambda x: getattr(x, "__name__", x))
def test_a_flag_does_what_it_says(script, name, base, tmp_path):
    """With one flag flipped a run ends, and differs from the base run as the flag says."""
    changes, holds = FLIPPED[name]
    old = base(script)
    settings = small(script.__name__, **({"run_root": str(tmp_path)} | changes))
    assert set(changes) <= {name, "env_id", "model_patience"}
    assert holds(Outcome(script, settings), old)


@every_script
def test_compile_asks_torch_to_compile(script, tmp_path, monkeypatch):
    """The updates are handed to torch.compile, which is off only with --no-compile."""
    asked = []

    def compiler(function, disable, **options):
        asked.append((disable, options))
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    graphs = 2 if script is sac else 4  # with the trial graph
    for on in (True, False):
        asked.clear()
        settings = small(script.__name__, run_root=str(tmp_path / str(on)), compile=on)
        script.train(script.Args(**settings))
        assert [disable for disable, _ in asked] == [not on] * graphs
        assert all(options["fullgraph"] for _, options in asked[1:])


@every_script
def test_captured_updates_find_their_state_where_it_was(script, tmp_path, monkeypatch):
    """What a GPU replays as a CUDA graph gets its state in the same, marked memory at every call.

    That holds after a fit, after an evaluation, and in a run that is taken up again.
    """
    places = {}

    def compiler(function, disable, mode=None, **options):
        def call(state, *inputs):
            tensors = tree_leaves(state)
            assert all(hasattr(x, "_dynamo_static_input_type") for x in tensors)
            name = function.args[0].__name__
            places.setdefault(name, []).append([x.data_ptr() for x in tensors])
            return function(state, *inputs)

        return call if mode == "reduce-overhead" else function

    monkeypatch.setattr(torch, "compile", compiler)
    settings = small(script.__name__, run_root=str(tmp_path)) | {"checkpoint_frequency": 10}
    settings |= {} if script is sac else {"model_train_frequency": 20}
    for resume, steps in ((False, 80), (True, 100)):
        places.clear()
        script.train(script.Args(**settings | {"resume": resume, "total_timesteps": steps}))
        assert places.keys() == {"sac_update", "model_update"} - {script is sac and "model_update"}
        assert all(all(one == calls[0] for one in calls) for calls in places.values())
        assert len(places["sac_update"]) > 5


@every_script
def test_track_logs_to_weights_and_biases(script, tmp_path, monkeypatch):
    """--track starts a run at Weights & Biases, with the project, team and settings given."""
    (tmp_path / "wandb.py").write_text("calls = []\ndef init(**given): calls.append(given)\n")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"track": True, "wandb_project_name": "mine", "wandb_entity": "us"}
    outcome = Outcome(script, small(script.__name__, run_root=str(tmp_path / "runs"), **names))
    (given,) = sys.modules.pop("wandb").calls
    assert (given["project"], given["entity"]) == ("mine", "us")
    assert given["id"] == outcome.folder.name
    assert given["config"]["env_id"] == "InvertedPendulum-v5"
    assert given["sync_tensorboard"] is True


@every_script
def test_capture_video_records_the_first_episode_of_each_evaluation(script, tmp_path, monkeypatch):
    """The evaluation's environment is rendered and recorded; the run itself stays the same."""
    recorded = {}

    def record(env, folder, episode_trigger):
        recorded.update(folder=folder, episodes=[n for n in range(9) if episode_trigger(n)])
        return env

    asked, make, find = [], script.make_env, importlib.util.find_spec
    present = lambda name, *rest: name == "moviepy" or find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", present)
    monkeypatch.setattr(gym.wrappers, "RecordVideo", record)
    monkeypatch.setattr(
        script, "make_env", lambda name, render=False: asked.append(render) or make(name)
    )
    settings = small(script.__name__, run_root=str(tmp_path), eval_episodes=3, capture_video=True)
    outcome = Outcome(script, settings)
    assert asked == [False, True]
    assert recorded == {"folder": str(outcome.folder / "videos"), "episodes": [0, 3, 6]}


@every_script
def test_what_a_run_writes(script, tmp_path):
    """Settings, evaluations, a checkpoint and TensorBoard's curves lie in the run's folder."""
    name = script.__name__
    changes = {"total_timesteps": 1000, "learning_starts": 990, "eval_frequency": 500}
    outcome = Outcome(script, small(name, run_root=str(tmp_path), **changes))
    names = {path.name.split(".")[0] for path in outcome.folder.iterdir()}
    assert names == {"args", "checkpoint", "eval", "events"}
    settings = outcome.saved["settings"]
    assert settings["script"] == f"{name}.py"
    assert settings.keys() == fields(script).keys() | {"script"}
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
    model |= {"reward_std_ratio", "loss", "updates", "holdout_mse"}
    if script is not sac:
        update |= {"sac/real_reward", "sac/synthetic_reward"}
        assert all(steps.pop(f"model/{part}") == [990] for part in model)
    assert all(steps.pop(tag) == [1000] for tag in update)
    assert steps.pop("eval/return") == steps.pop("eval/critic_bias") == [0, 500, 1000]
    np.testing.assert_allclose([x for _, x in scalars["eval/return"]], rows[:, 1], rtol=1e-4)
    ends = outcome.rows[:, -1].nonzero().flatten() + 1
    assert steps.pop("train/episode_return") == ends.tolist()
    assert not steps


def all_tasks() -> list[tuple[str, str]]:
    """The suite's tasks; quadruped-escape needs a renderer, lqr's actions have no bounds."""
    from dm_control import suite

    return [task for task in suite.ALL_TASKS if task[0] != "lqr" and task[1] != "escape"]


def test_every_task_of_the_suite_can_be_made():
    """Observations are flat, actions in [-1, 1]."""
    tasks = all_tasks()
    assert len(tasks) >= 40
    for domain, task in tasks:
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


@every_script
def test_evaluations_leave_training_alone(script, base, tmp_path):
    """With evaluations or none, a run learns the same to the bit."""
    old = base(script)
    new = Outcome(script, small(script.__name__, run_root=str(tmp_path), eval_frequency=0))
    assert not (new.folder / "eval.csv").exists()
    for part in old.saved.keys() - {"settings", "progress"}:
        assert same(new.saved[part], old.saved[part]), part


class Broken(gym.Wrapper):
    """A task whose observation or reward is not a number after some steps."""

    def __init__(self, env, part: str, after: int):
        super().__init__(env)
        self.part, self.left = part, after

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.left -= 1
        if self.left == 0 and self.part == "reward":
            reward = float("nan")
        if self.left == 0 and self.part == "observation":
            obs = obs + float("nan")
        return obs, reward, *rest


@pytest.mark.parametrize("part", ["reward", "observation"])
@every_script
def test_a_number_that_is_not_finite_stops_the_run(script, part, main, monkeypatch):
    """The environment's nan ends the run with a line of the quantity and the step."""
    make = script.make_env
    monkeypatch.setattr(script, "make_env", lambda name, _=False: Broken(make(name), part, 23))
    code, _, err = main(script, flags(small(script.__name__, eval_frequency=0)))
    assert code == 1
    assert one_error(err) == f"error: {part} is not finite at step 23: the run stops"


@every_script
def test_learning_that_diverges_stops_the_run(script, main):
    """So do losses without bound."""
    settings = small(script.__name__, eval_frequency=0, q_lr=1e30)
    code, _, err = main(script, flags(settings))
    assert code == 1
    assert one_error(err) == "error: actor_loss is not finite at step 41: the run stops"


@every_model
def test_a_model_that_diverges_stops_the_run(script, main):
    """And the model's."""
    code, _, err = main(script, flags(small(script.__name__, eval_frequency=0, model_lr=1e30)))
    assert code == 1
    assert one_error(err).startswith("error: model ")
    assert "is not finite at step 40: the run stops" in err


def test_without_a_compiler_a_run_goes_on(run, tmp_path):
    """Where torch.compile has no C++ compiler, one line says so and the run ends as ever."""
    (tmp_path / "bin").mkdir()
    env = os.environ | {"CXX": "/nonexistent", "PATH": str(tmp_path / "bin")}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    words = flags(small("sac", run_root=str(tmp_path / "runs"), compile=True))
    child = run("sac", *words, env=env)
    assert child.returncode == 0, child.stderr
    lines = [line for line in child.stderr.splitlines() if line.startswith("going on uncompiled: ")]
    assert len(lines) == 1
    assert "Traceback" not in child.stderr
    assert len(read_evaluations(folder_of(tmp_path / "runs", "sac"))) == 4
