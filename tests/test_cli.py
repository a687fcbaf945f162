"""The command line, what a run writes, and what is told of it."""

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_run import (
    ROOT,
    SCRIPTS,
    Outcome,
    fields,
    flags,
    folder_of,
    one_error,
    read_evaluations,
    read_scalars,
    run,
    same,
    small,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mbpo
import mbpo_residual_ablation
import sac

OTHER = "mps" if torch.cuda.is_available() else "cuda"  # a device that is not here
one_of_each = pytest.mark.parametrize("script", [sac, mbpo], ids=["sac", "mbpo"])
NONE_NEAR = "no such task: ids are dmc/<domain>-<task>, Gymnasium's, and <module>:<id>"

BAD = [  # flags, and what the line must say
    ("--env-id dmc/walker-rum", "did you mean dmc/walker-run"),
    ("--env-id Hopper", "did you mean Hopper-v"),
    ("--env-id environments:Pointe-v0", "did you mean environments:Point-v0"),
    ("--env-id NoSuchEnv-v0", f"--env-id NoSuchEnv-v0: {NONE_NEAR}"),
    ("--env-id ALE/Pong-v5", f"--env-id ALE/Pong-v5: {NONE_NEAR}"),
    ("--env-id /tmp/", f"--env-id /tmp/: {NONE_NEAR}"),
    ("--env-id no_such_module:Point-v0", "No module named 'no_such_module'"),
    ("--env-id dmc/lqr-lqr_2_1", "actions must be bounded"),
    ("--total-timesteps 0", "--total-timesteps must be at least 1, not 0"),
    ("--total-timesteps 39", "--total-timesteps must be at least --learning-starts, not 39"),
    ("--eval-frequency -1", "--eval-frequency must be 0 or more, not -1"),
    ("--gamma nan", "--gamma must be above 0 and at most 1, not nan"),
    ("--tau 1.5", "--tau must be above 0 and at most 1, not 1.5"),
    ("--policy-lr 0", "--policy-lr must be above 0 and finite, not 0.0"),
    ("--q-lr inf", "--q-lr must be above 0 and finite, not inf"),
    ("--target-entropy nan", "--target-entropy must be a finite number, not nan"),
    ("--seed -1", "--seed must be from 0 to 2^63 - 1, not -1"),
    ("--seed 9223372036854775808", "--seed must be from 0 to 2^63 - 1, not 9223372036854775808"),
    (f"--device {OTHER}", "--device must be one that is here (c"),
    ("--buffer-size 1000000000000", "replay buffers need"),
    ("--run-root {root}/file/below", "--run-root {root}/file/below can't be written: "),
    ("--run-root /proc/none", "--run-root /proc/none can't be written: "),
    (f"--run-root {300 * 'x'}", "--run-root"),  # longer than a name may be
]
BAD_MODEL = [
    ("--num-elites 9", "--num-elites must be at most --ensemble-size, not 9"),
    ("--model-patience 0", "--model-patience must be at least 1, not 0"),
    ("--model-beta 2", "--model-beta must be from 0 to 1, not 2.0"),
    ("--real-ratio 1", "--real-ratio must be at least 0 and below 1, not 1.0"),
    ("--batch-size 16", "--batch-size must be at least 1 / --real-ratio, not 16"),
    ("--holdout-ratio 1", "--holdout-ratio must be above 0 and below 1, not 1.0"),
    ("--learning-starts 4", "--learning-starts must be at least 1 / --holdout-ratio, not 4"),
    ("--buffer-size 4", "--buffer-size must be at least 1 / --holdout-ratio, not 4"),
    (
        "--rollout-schedule 10 5 1 1",
        "--rollout-schedule must be START END FROM TO, with",
    ),
    (
        "--rollout-schedule 0 1 0 1",
        "--rollout-schedule must be START END FROM TO, with",
    ),
    ("--rollouts-per-step 1000000000", "replay buffers need"),
    ("--env-id HumanoidStandup-v5", "--never-terminates"),
]
TYPES = [  # from Python, where nothing is read from words
    ({"gamma": "x"}, "--gamma must be of type float, not 'x'"),
    ({"seed": True}, "--seed must be of type int, not True"),
    ({"seed": 1.0}, "--seed must be of type int, not 1.0"),
    ({"model_patience": 2.5}, "--model-patience must be of type"),
    ({"env_id": None}, "--env-id must be of type str, not None"),
    ({"compile": 0}, "--compile must be of type bool, not 0"),
    ({"precision": "half"}, "--precision must be exact or fast, not 'half'"),
    ({"rollout_schedule": 5}, "--rollout-schedule must be"),
    ({"rollout_schedule": (0, 1, 1, "2")}, "--rollout-schedule must be"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_input_is_one_line(words, said, refused, tmp_path):
    """What can't be done ends before anything is written, with a line that says why."""
    (tmp_path / "file").write_text("in the way")
    words, said = (text.replace("{root}", str(tmp_path)) for text in (words, said))
    assert said in refused(sac, [*flags(small("sac")), *words.split()])


@pytest.mark.parametrize(("words", "said"), BAD_MODEL)
def test_bad_input_of_the_model_is_one_line(words, said, refused):
    """The same for what only the scripts with a model have."""
    assert said in refused(mbpo, [*flags(small("mbpo")), *words.split()])


@pytest.mark.parametrize(("changes", "said"), TYPES)
def test_a_value_of_another_type_is_refused(changes, said, tmp_path):
    """From Python, too, settings are checked before anything is written."""
    args = mbpo.Args(**small("mbpo", run_root=str(tmp_path)) | changes)
    with pytest.raises(mbpo.InputError) as error:
        mbpo.train(args)
    assert str(error.value).startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["--no-such-flag 3", "--precision half", "--seed 1.5"])
def test_words_that_no_flag_takes(words, main, tmp_path):
    """A flag that a script doesn't have, or a word that it can't read, ends with exit code 2."""
    code, _, err = main(sac, words.split())
    assert code == 2
    assert words.split()[0] in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_numbers_in_scientific_notation(main, tmp_path):
    """1e2 is 100 for whole numbers; all other words stay as they are."""
    words = flags(small("sac", exp_name="of1e2", total_timesteps="1e2", learning_starts="4e1"))
    code, out, err = main(sac, [*words, "--alpha", "1.5e1", "--q-lr=3e-4", "--buffer-size=1e3"])
    assert (code, err) == (0, "")
    assert "100 steps are done" in out
    held = json.loads((folder_of(tmp_path, "of1e2") / "args.json").read_text())
    assert (held["learning_starts"], held["buffer_size"]) == (40, 1000)
    assert (held["alpha"], held["q_lr"], held["exp_name"]) == (15, 3e-4, "of1e2")


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
    monkeypatch.setattr(importlib.util, "find_spec", lambda x, *y: x != "moviepy" and find(x, *y))
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = flags(small("sac"))
    assert "pip install moviepy" in refused(sac, [*words, "--capture-video"])
    assert "pip install wandb" in refused(sac, [*words, "--track"])


def test_without_a_renderer_only_what_draws_is_refused(refused, monkeypatch, tmp_path):
    """Where OpenGL's library is missing Pendulum trains, and what draws is told what to set."""
    env, words = os.environ | {"MUJOCO_GL": "osmesa"}, small("sac", run_root=str(tmp_path))
    child = run("sac", *flags(words | {"env_id": "Pendulum-v1"}), env=env)
    assert (child.returncode, child.stderr) == (0, "")
    child = run("sac", *flags(words | {"env_id": "dmc/cartpole-balance"}), env=env)
    assert child.returncode == 2
    assert "; try MUJOCO_GL=egl, or apt install libegl1" in one_error(child.stderr)

    def fail(*_):
        raise RuntimeError("no OpenGL\nsecond line")

    monkeypatch.setattr("gymnasium.envs.mujoco.mujoco_env.MujocoEnv.render", fail)
    line = refused(sac, [*flags(words), "--capture-video"])
    assert "no OpenGL; try MUJOCO_GL=egl" in line


def test_a_task_of_ones_own(tmp_path):
    """A module beside the script registers a task, by an id that the scripts don't know."""
    shutil.copy(ROOT / "tests" / "environments.py", tmp_path / "my_env.py")
    shutil.copy(ROOT / "sac.py", tmp_path)
    command = [sys.executable, "sac.py", *flags(small("sac", env_id="my_env:Point-v0"))]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    folder = folder_of(tmp_path / "runs", "sac", "my_env:Point-v0")
    assert [row[0] for row in read_evaluations(folder)] == ["step", "0", "40", "80"]


def help_of(script) -> dict[str, str]:
    """Definition and comment of every flag, as the source has them."""
    source = inspect.getsource(script.Args)
    lines, nodes = source.splitlines(), ast.parse(source).body[0].body
    return {node.target.id: " ".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


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
        assert source.split("# ")[1].rstrip(" )") in shown, name


def test_scripts_share_flags():
    """A flag has the same default and explanation in all scripts, but for updates per step."""
    base, model, ablation = map(help_of, (sac, mbpo, mbpo_residual_ablation))
    assert {name for name in base if base[name] != model[name]} == {"updates_per_step"}
    assert fields(sac)["updates_per_step"] == 1
    assert fields(mbpo)["updates_per_step"] == 20
    assert {name: ablation[name] for name in model} == model
    assert ablation.keys() - model.keys() == {"normalize_targets", "predict_residual"}


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
    return not same(new.agent, old.agent) and len(new.rows) == len(old.rows)


def models_otherwise(new, old):
    return not same(new.learner["params"], old.learner["params"])


def is_the_same(new, old):
    return same(new.agent, old.agent) and same(new.rows, old.rows)


FLIPPED = {  # of each flag: another value, and what must hold of the new and the old run
    "env_id": ("Hopper-v5", lambda new, old: new.rows.shape[1] == 11 + 3 + 1 + 11 + 1),
    "seed": (2, lambda new, old: new.folder.name[-3:] == "__2" and learns_otherwise(new, old)),
    "total_timesteps": (70, lambda new, old: new.step == len(new.rows) == 70),
    "learning_starts": (50, learns_otherwise),
    "updates_per_step": (2, lambda new, old: new.updates == 2 * old.updates == 2 * 21),
    "batch_size": (20, learns_otherwise),
    "gamma": (0.5, learns_otherwise),
    "tau": (0.5, learns_otherwise),
    "policy_lr": (1e-2, learns_otherwise),
    "q_lr": (1e-2, learns_otherwise),
    "autotune": (False, lambda new, old: new.agent["log_alpha"]["params"] == 0),
    "alpha": (0.5, learns_otherwise),
    "target_entropy": (3.0, learns_otherwise),
    "buffer_size": (50, lambda new, old: new.saved["buffer"]["added"] == 60 > len(new.rows) == 50),
    "eval_frequency": (20, lambda new, old: [x[0] for x in new.evaluations][1:3] == ["20", "40"]),
    "eval_episodes": (3, lambda new, old: {x[-1] for x in new.evaluations} == {"3"}),
    "checkpoint_frequency": (0, lambda new, old: new.saved is None),
    "run_root": (None, lambda new, old: new.folder.parent != old.folder.parent),
    "exp_name": ("other", lambda new, old: "v5__other__1" in new.folder.name),
    "device": ("cpu", is_the_same),
    "resume": (True, is_the_same),
    "ensemble_size": (4, lambda new, old: len(new.learner["m"]["layers"][0][0]) == 4),
    "num_elites": (3, lambda new, old: len(new.model["elites"]) == 3),
    "model_hidden": (24, lambda new, old: new.learner["m"]["layers"][1][0].shape == (3, 24, 24)),
    "model_lr": (1e-2, models_otherwise),
    "model_beta": (0.5, models_otherwise),
    "model_train_frequency": (8, lambda new, old: new.fitted == 30 + 5 + 5 > old.fitted == 30),
    "model_first_updates": (3, lambda new, old: new.fitted == 3),
    "model_updates": (7, lambda new, old: new.fitted == 30 + 7 + 7),
    "model_patience": (1, lambda new, old: new.fitted not in (0, 30)),
    "holdout_ratio": (0.5, models_otherwise),
    "rollouts_per_step": (5, lambda new, old: len(new.synthetic) == 21 * 5),
    "rollout_schedule": ((0, 1, 1, 2), lambda new, old: len(new.synthetic) > 21 * 10),
    "real_ratio": (0.5, learns_otherwise),
    "never_terminates": (True, lambda new, old: new.synthetic[:, -1].sum() == 0),
    "normalize_targets": (False, lambda new, old: "targets" in old.model.keys() - new.model.keys()),
    "predict_residual": (False, models_otherwise),
}
ALSO = {  # what must change with a flag
    "run_root": {},
    "model_updates": {"model_train_frequency": 10},
    "never_terminates": {"env_id": "Pendulum-v1"},
}
BELOW = {"compile", "track", "capture_video", "precision"}


def test_every_flag_has_a_test():
    """The table and the tests below it are about all flags."""
    assert {*FLIPPED, *BELOW} == {name for each in SCRIPTS for name in fields(each)}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flag_does_what_it_says(name, base, tmp_path):
    """With one flag flipped a run ends, and differs from the base run as the flag says."""
    value, holds = FLIPPED[name]
    script = next(s for s in (sac, mbpo, mbpo_residual_ablation) if name in fields(s))
    changes = {name: value} | ALSO.get(name, {}) | {"run_root": str(tmp_path)}
    assert holds(Outcome(script, brief(script.__name__, **changes)), base(script))


@pytest.mark.parametrize("value", ["exact", "fast"])
def test_products_are_exact_or_fast(value, main):
    """With --precision exact no product of float32 is rounded; fast leaves it to the processor."""
    code, _, err = main(sac, flags(brief("sac", precision=value, eval_frequency=0)))
    assert (code, err) == (0, "")
    chosen = torch.get_float32_matmul_precision()
    x = torch.full((256, 256), 1 + 2**-12, device=sac.Args().device)
    if value == "exact":
        assert (x @ x).amin() == 256.125
        torch.set_float32_matmul_precision("medium")  # which is as exact where nothing is rounded
        assert chosen == ("medium" if (x @ x).amin() == 256.125 else "highest")
    else:
        assert chosen == "medium"


def test_track_logs_to_weights_and_biases(monkeypatch, tmp_path):
    """--track starts a run at Weights & Biases, and ends it; the next one is a run of its own."""
    calls = []
    package = SimpleNamespace(init=lambda **x: calls.append(x), finish=lambda: calls.append(0))
    monkeypatch.setitem(sys.modules, "wandb", package)
    for seed in (1, 2):
        outcome = Outcome(sac, brief("sac", run_root=str(tmp_path), track=True, seed=seed))
        given, ending = calls[2 * seed - 2 :]
        assert (given["id"], given["config"]["seed"]) == (outcome.folder.name, seed)
        assert given["sync_tensorboard"] is given["reinit"] is True
        assert ending == 0


def test_track_without_a_login_is_refused(refused, monkeypatch):
    """It is one line, and no run folder is left behind."""

    def init(**given):
        raise RuntimeError("no API key configured\nsecond line")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    line = refused(sac, [*flags(small("sac")), "--track"])
    assert "--track: no API key configured" in line
    assert "wandb login" in line


@pytest.mark.parametrize("episodes", [1, 3])
@pytest.mark.parametrize("name", ["Plain-v0", "OneStep-v0"])
def test_capture_video_records_the_first_episode_of_each_evaluation(name, episodes, tmp_path):
    """A file by the step of each, as fast as the task goes; the run itself stays the same."""
    moviepy = pytest.importorskip("moviepy")
    settings = small("sac", env_id=f"environments:{name}", eval_episodes=episodes)
    filmed = Outcome(sac, settings | {"run_root": str(tmp_path / "on"), "capture_video": True})
    plain = Outcome(sac, settings | {"run_root": str(tmp_path / "off")})
    files = sorted((filmed.folder / "videos").glob("*.mp4"))
    assert [re.match(r"step-(\d+)-", file.name)[1] for file in files] == ["0", "40", "80"]
    for file in files:
        with moviepy.VideoFileClip(str(file)) as clip:
            assert clip.fps == 100
    assert filmed.evaluations == plain.evaluations
    assert same(filmed.agent, plain.agent)


def test_a_task_of_the_suite_says_how_fast_it_goes():
    """Videos of cartpole have 100 frames per second, those of walker 40."""
    for env_id, seconds in {"dmc/cartpole-balance": 0.01, "dmc/walker-run": 0.025}.items():
        assert sac.make_env(env_id).unwrapped.dt == pytest.approx(seconds)


@one_of_each
def test_what_a_run_writes(script, tmp_path):
    """Settings, evaluations, a checkpoint and TensorBoard's curves lie in the run's folder."""
    name = script.__name__
    changes = {"total_timesteps": 1000, "learning_starts": 740, "eval_frequency": 500}
    outcome = Outcome(script, small(name, run_root=str(tmp_path), **changes))
    names = {path.name.split(".")[0] for path in outcome.folder.iterdir()}
    assert names == {"args", "checkpoint", "eval", "events"}
    settings = outcome.saved["settings"]
    assert settings["script"] == f"{name}.py"
    assert settings.keys() == fields(script).keys() | {"script", "version"}
    assert settings == json.loads((outcome.folder / "args.json").read_text())
    header, *lines = (outcome.folder / "eval.csv").read_text().splitlines()
    assert header == "step,mean,std,min,max,episodes,seconds"
    assert lines == outcome.result["evaluations"]
    assert same(outcome.result["agent"], outcome.agent)
    rows = np.array([line.split(",") for line in lines], dtype=float)
    assert rows[:, 0].tolist() == [0, 500, 1000]
    assert (rows[:, 3] <= rows[:, 1]).all()
    assert (rows[:, 1] <= rows[:, 4]).all()
    assert (np.diff(rows[:, 6]) > 0).all()
    (text,) = EventAccumulator(str(outcome.folder)).Reload().Tensors("hyperparameters/text_summary")
    assert all(each in str(text.tensor_proto.string_val) for each in fields(script))
    scalars = read_scalars(outcome.folder)
    steps = {tag: [step for step, _ in values] for tag, values in scalars.items()}
    update = {f"sac/{part}" for part in ("q_loss", "q", "actor_loss", "entropy", "alpha")}
    fit, new = {"loss", "updates", "holdout_mse"}, {"reward_error", "change_error"}
    if script is not sac:
        assert all(steps.pop(f"model/{part}") == [740, 990] for part in fit)
        assert all(steps.pop(f"model/new_{part}") == [990] for part in new | {"reward_std_ratio"})
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


def test_progress_without_evaluations(main):
    """Every 1,000 steps there is a line; the last one names only the files that are there."""
    changes = {"total_timesteps": 2000, "learning_starts": 1990, "eval_frequency": 0}
    code, out, err = main(sac, flags(small("sac", checkpoint_frequency=0, **changes)))
    assert (code, err) == (0, "")
    assert re.findall(r"^step +(\d+)\b", out, re.MULTILINE) == ["1000", "2000"]
    assert not any(name in out.splitlines()[-1] for name in ("checkpoint.pt", "eval.csv"))


def test_from_python_nothing_is_warned_of(tmp_path):
    """train(Args(...)) ends without a word on stderr, even with all warnings shown."""
    settings = small("mbpo", run_root=str(tmp_path / "runs"), env_id="dmc/cartpole-balance")
    settings |= {"total_timesteps": 45, "eval_frequency": 0}
    program = f"import mbpo\nmbpo.train(mbpo.Args(**{settings!r}))"
    command = [sys.executable, "-W", "default", "-c", program]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "Warning" not in child.stderr


def test_a_trained_policy_acts_as_in_the_last_evaluation(tmp_path):
    """From Python: the task, the policy of a run's folder, and the returns of its last episodes."""
    outcome = Outcome(sac, small("sac", env_id="Pendulum-v1", run_root=str(tmp_path)))
    env, policy = sac.make_env("Pendulum-v1"), sac.load_policy(str(outcome.folder))
    returns = []
    for i in range(2):
        (obs, _), over, rewards = env.reset(seed=sac.derive_seed(1, 1, 80, i)), False, []
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs))
            rewards.append(reward)
            over = terminated or truncated
        returns.append(sum(rewards))
    assert float(outcome.evaluations[-1][1]) == pytest.approx(np.mean(returns), rel=1e-4)
    with pytest.raises(sac.InputError, match="holds no checkpoint"):
        sac.load_policy(tmp_path)


DIVERGES = [(sac, "q_lr", "actor_loss is not finite at step 41")]
DIVERGES += [(mbpo, "model_lr", "model_loss is not finite at step 40")]


@pytest.mark.parametrize(("script", "rate", "said"), DIVERGES, ids=["sac", "mbpo"])
def test_learning_that_diverges_stops_the_run(script, rate, said, main):
    """Losses without bound end it with a line of the quantity and the step."""
    settings = small(script.__name__, eval_frequency=0) | {rate: 1e30}
    code, _, err = main(script, flags(settings))
    assert code == 1
    assert one_error(err) == f"error: {said}: the run stops"


BROKEN = """#!/bin/sh
case "$1" in --version|-v|-dumpversion) exec g++ "$@";; esac
echo "fatal error: no headers" >&2; exit 1
"""


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_compiler_the_line_says_what_to_do(broken, tmp_path):
    """It is tried before the first step, whether it is missing or fails; one line says so."""
    file, root = tmp_path / "compiler", tmp_path / "runs"
    if broken:
        file.write_text(BROKEN)
        file.chmod(0o755)
    env, settings = os.environ | {"CXX": str(file)}, small("sac", run_root=str(root))
    child = run("sac", *flags(settings), "--compile", env=env)
    assert (child.returncode, child.stdout) == (2, "")
    line = one_error(child.stderr)
    assert line.startswith("error: torch.compile fails: ")
    assert ("no headers" in line) == broken
    assert line.endswith("give --no-compile")
    assert not root.exists()
    if broken:
        child = run("sac", *flags(settings), env=env)
        assert (child.returncode, child.stderr) == (0, "")


def test_a_cache_for_kernels_with_a_space_in_its_path(tmp_path):
    """Either the compiler takes it, or one line says what to do before anything is written."""
    env, root = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/a b"}, tmp_path / "runs"
    child = run("sac", *flags(small("sac", compile=True, run_root=str(root))), env=env)
    if child.returncode:
        assert child.returncode == 2
        assert "--no-compile" in one_error(child.stderr)
    assert (folder_of(root, "sac") / "checkpoint.pt").exists() == root.exists()
    assert root.exists() == (child.returncode == 0)
