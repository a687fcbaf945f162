"""The instrument that measures a model's errors: its data, its formulas, what it keeps."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import mechanism
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_tools import call
from mechanism import Options, collect, fit, measure, plan, pose, run, scales

import mbpo
import mbpo_ftfl
import sac

POLE, CHEETAH = "InvertedPendulum-v5", "HalfCheetah-v5"
WORDS = "--transitions 40 --budgets 1 3 --members 2 --no-compile --jobs 1 --seeds 1 --betas 0"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """No patched scripts are written, no pictures drawn, and 100 transitions are enough."""
    monkeypatch.setattr(mechanism, "collect", lambda task, run, n, *_: collect(task, run, n % 4900))
    monkeypatch.setattr(mechanism, "write", lambda: None)
    monkeypatch.setattr(mechanism.sns, "relplot", MagicMock())
    mechanism.data_of.cache_clear()
    mechanism.pose.cache_clear()


@pytest.fixture
def tool(tmp_path):
    """Runs the tool on a pendulum; returns exit code, stdout and stderr."""
    words = "--tasks", POLE, "--out", tmp_path / "out", *WORDS.split(), "--cells", "mbpo"
    return lambda *more: call(run, Options, *words, *more)


def batch_of(rows: torch.Tensor, task: str) -> mbpo.Batch:
    env = mbpo.make_env(task)
    sizes = env.observation_space.shape[0], env.action_space.shape[0], "cpu"
    return mbpo.ReplayBuffer(1, *sizes).unpack(rows)


def test_new_actions_lead_where_the_simulator_leads():
    """A cheetah put into each state by its own means goes the same way, but for x."""
    rows, others = (batch_of(part, CHEETAH) for part in collect(CHEETAH, None, 50))
    asked = [t for t in range(50) if t % 5 < 2]
    assert torch.equal(others.obs, rows.obs[asked])
    assert (others.action != rows.action[asked]).all()
    env = mbpo.make_env(CHEETAH)
    env.reset(seed=0)
    for obs, action, reward, next_obs, _ in zip(*(part.numpy() for part in others), strict=True):
        env.unwrapped.set_state(np.array([0, *obs[:8]]), obs[8:])
        there, gained, *_ = env.step(action.astype(np.float32))
        np.testing.assert_allclose(there, next_obs, atol=1e-4)
        assert gained == pytest.approx(reward, abs=1e-4)


@pytest.mark.parametrize("task", ["Ant-v5", "Humanoid-v5", "dmc/quadruped-walk", "dmc/finger-spin"])
def test_tasks_can_be_asked_again(task):
    """Contacts, sensors, and what the task keeps of the last step: all are in mjData."""
    assert [len(part) for part in collect(task, None, 12)] == [12, 6]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--tasks", POLE, "dmc/reacher-easy"), "dmc/reacher-easy can't be measured: an action"),
        (("--tasks", "Pendulum-v1"), "Pendulum-v1 can't be measured: it is no task of MuJoCo"),
        (("--tasks", "dmc/no-task"), "dmc/no-task: no such task"),
        (("--tasks",), "nothing to do"),
        (("--later", 0), "--later"),
        (("--budgets",), "--budgets"),
        (("--cells", "nothing"), "nothing.py"),
        (("--cells", "mbpo --no-such-option"), "no-such-option"),
        (("--betas", "2"), "model-beta"),
        (("--checkpoints", "/no/such"), "/no/such"),
    ],
)
def test_bad_input_is_refused_in_a_line(tool, tmp_path, words, reason):
    code, out, err = tool(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_the_formulas_by_loops():
    """The four numbers of 2 members, 5 transitions and 3 dimensions, one of which is constant."""
    torch.manual_seed(1)
    data = mbpo.Batch(*(torch.rand(9, *n).double() for n in [[3], [1], [], [3], []]))
    data.next_obs[:, 1] = data.obs[:, 1]
    batch = mbpo.Batch(*(part[:5] for part in data))
    mean, std = torch.rand(2, 2, 5, 4).double()
    script = SimpleNamespace(predict=lambda *_: (mean.clone(), std))
    means, each = measure({}, batch, data, script, None)
    v = [np.var(x) for x in [*(data.next_obs - data.obs).numpy().T, data.reward.numpy()]]
    error, spread, nll = np.zeros((3, 4))
    for e, b, i in np.ndindex(2, 5, 4):
        gap = float(mean[e, b, i] - (batch.next_obs[b, i] if i < 3 else batch.reward[b]))
        sigma = float(std[e, b, i])
        error[i] += gap**2 / 10
        spread[i] += sigma**2 / 10
        nll[i] += ((gap / sigma) ** 2 + np.log(sigma**2 / max(v[i], 1e-9))) / 10
    assert each["error"][1].isnan()
    expected = {"reward": error[3] / v[3], "nll": (nll[0] + nll[2] + nll[3]) / 3}
    expected["mean_change"] = (error[0] / v[0] + error[2] / v[2]) / 2
    expected["change"] = expected["mean_change"] + (spread[0] / v[0] + spread[2] / v[2]) / 2
    assert {name: value.item() for name, value in means.items()} == pytest.approx(expected)


@pytest.mark.parametrize("updates", [1, 3])
def test_errors_are_those_of_the_scripts_fit(updates):
    """Of so many steps, though the fit goes on; on the rows that it holds out."""
    key = POLE, "random", "one fit", 2, "unit s'", 0.0, 7
    table = fit(key, None, Options(transitions=40, budgets=(1, 3), compile=False))["errors"]
    (found,) = table[(table.set == "rows") & (table.updates == updates)].to_dict("records")

    args = mbpo_ftfl.Args(ensemble_size=2, num_elites=2, device="cpu", compile=False)
    data = batch_of(collect(POLE, None, 40)[0].float(), POLE)
    torch.manual_seed(7)
    learner = mbpo_ftfl.adam_init(mbpo_ftfl.init_ensemble(2, 5, 5, 200), "cpu")
    update = mbpo_ftfl.compiled_update(mbpo_ftfl.model_update, args)
    generator = torch.Generator().manual_seed(7)
    _, holdout = mbpo_ftfl.split(40, args, generator.clone_state())
    model, _ = mbpo_ftfl.fit_ensemble(learner, data, updates, update, args, generator)
    held = mbpo.Batch(*(part[holdout] for part in data))
    expected = mbpo_ftfl.errors_on_new(model, held, data, args)
    assert found["reward"] == pytest.approx(expected["new_reward_error"].item(), rel=1e-4)
    assert found["change"] == pytest.approx(expected["new_change_error"].item(), rel=1e-4)


def test_a_cell_is_a_script_and_its_options():
    for cell, script in {"raw s' - s": mbpo, "unit s'": mbpo_ftfl}.items():
        assert pose("", cell, 0.5, 3, False)[0].__file__ == script.__file__
    _, args, _ = pose("", "mbpo_residual_ablation --model-lr 2e-3", 0.5, 3, False)
    assert (args.model_lr, args.model_beta, args.ensemble_size) == (2e-3, 0.5, 3)
    _, args, _ = pose("", "raw s'", 0.0, 3, False)
    assert (args.normalize_targets, args.predict_residual) == (False, False)


def test_plan_of_later_fits():
    """Fits grow with the data, are measured where asked, and begin anew at twice the data."""
    how = {"transitions": 100, "later": 5, "first": 10, "every": 50, "at": (100, 200)}
    name, fits, places = plan(Options(**how))
    assert (name, fits[2], places) == ("10, 5 every 50", (200, 5, False), {10: 100, 20: 200})
    name, fits, places = plan(Options(**how, fresh=True))
    assert (name, fits[2], places) == ("10, 5 every 50, fresh", (200, 10, True), {10: 100, 25: 200})


def test_finished_fits_are_not_made_again(tool, tmp_path, monkeypatch):
    """Another run adds what is missing, and shows all there is."""
    out, made = tmp_path / "out", []
    assert tool("--cells", "unit s'", "--dimensions")[0] == 0
    monkeypatch.setattr(mechanism, "fit", lambda *each: made.append(each[0]) or fit(*each))
    before = (out / "errors.csv").read_text()
    assert tool("--cells", "unit s'")[1] == (out / "table.md").read_text()
    assert (made, (out / "errors.csv").read_text()) == ([], before)
    tool("--cells", "unit s'", "raw s'")
    assert [key[4] for key in made] == ["raw s'"]
    later = "--later", 2, "--first", 1, "--every", 20, "--at", 40, 80
    shown = tool("--cells", "unit s'", *later)[1]
    assert (shown.count("1, 2 every 20"), shown.count("one fit")) == (2, 2)
    assert (out / "errors.csv").read_text().startswith(before)
    assert {*pd.read_csv(out / "dimensions.csv").dimension} == {"s[0]", "s[1]", "s[2]", "s[3]", "r"}


def test_a_run_is_measured_with_its_policy(tool, tmp_path):
    """New transitions, and new actions, by the sampled policy of its checkpoint."""
    how = {"learning_starts": 40, "total_timesteps": 40, "eval_frequency": 0, "compile": False}
    agent = sac.train(sac.Args(env_id=POLE, run_root=str(tmp_path), buffer_size=100, **how))[
        "agent"
    ]
    folder = tmp_path / f"{POLE}__sac__1"
    for part in collect(POLE, folder, 20):
        batch = batch_of(part.float(), POLE)
        mean, _ = sac.sample_action(agent["actor"]["params"], batch.obs, 0.0)
        assert 1e-3 < (batch.action - mean).abs().max() < 0.2  # a new policy hardly varies
    assert tool("--tasks", "--checkpoints", folder, "--cells", "unit s'")[0] == 0
    table = pd.read_csv(tmp_path / "out" / "errors.csv")
    assert ({*table.data}, {*table.task}) == ({folder.name}, {POLE})


def test_scales_by_hand(tmp_path, monkeypatch):
    """A dimension that is constant, one that goes up or down, one that turns over."""
    s = torch.tensor([[5.0, 1, 1], [5, 2, -1], [5, 4, 1], [5, 3, -1]])
    after = torch.stack([s[:, 0], s[:, 1] + torch.tensor([1, 2, -1, 0]), -s[:, 2]], 1)
    reward = torch.tensor([[0], [0], [2], [2]])  # of variance 1
    rows = torch.cat([s, torch.zeros(4, 1), reward, after, torch.zeros(4, 1)], 1).double()
    env = SimpleNamespace(observation_space=SimpleNamespace(shape=(3,)))
    monkeypatch.setattr(mechanism, "collect", lambda *_: [rows])
    monkeypatch.setattr(mechanism, "load_script", lambda _: SimpleNamespace(make_env=lambda _: env))
    scales(Options(tasks=("task",), out=tmp_path))
    (found,) = pd.read_csv(tmp_path / "scales.csv").to_dict("records")
    rho = np.corrcoef([1, 2, 4, 3], [2, 4, 3, 3])[0, 1]
    assert found["residual_over_reward"] == pytest.approx((1.25 + 4) / 2)
    assert (found["rho_min"], found["rho_negative"]) == (pytest.approx(-1), 0.5)
    assert found["rho_median"] == pytest.approx((rho - 1) / 2, rel=1e-4)
