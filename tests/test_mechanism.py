"""The instrument that measures a model's errors: its data, its formulas, what it keeps."""

from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import mechanism
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_tools import call, refusal
from mechanism import Options, collect, fit, measure, plan, present, run, scales

import mbpo
import mbpo_ftfl
import sac

POLE, CHEETAH = "InvertedPendulum-v5", "HalfCheetah-v5"
WORDS = "--transitions 40 --budgets 1 3 --members 2 --no-compile --jobs 1 --seeds 1"


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """No patched scripts are written, no pictures drawn, and 100 transitions are enough."""
    monkeypatch.setattr(mechanism, "collect", lambda task, run, n, *_: collect(task, run, n % 4900))
    monkeypatch.setattr(mechanism, "write", lambda: None)
    monkeypatch.setattr(mechanism.sns, "relplot", MagicMock())
    mechanism.pose.cache_clear()


def tool(out) -> tuple:
    """The words that have few steps made on a pendulum."""
    return "--tasks", POLE, "--out", out, *WORDS.split(), "--betas", 0, "--cells", "mbpo"


def batch_of(rows: torch.Tensor, task: str) -> mbpo.Batch:
    """The parts of rows of a task."""
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


BAD = {
    f"--tasks {POLE} dmc/reacher-easy": "dmc/reacher-easy can't be measured: an action",
    "--tasks Pendulum-v1": "Pendulum-v1 can't be measured: it is no task of MuJoCo",
    "--tasks": "nothing to do",
    "--later 0": "--later must be at least 1",
    "--budgets": "--budgets must be at least 1",
    "--cells nothing": "nothing.py",
    "--betas 2": "--model-beta must be from 0 to 1",
    "--checkpoints /no/such": "/no/such",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_a_line(tmp_path, words):
    """Exit code 2, and nothing is written."""
    assert BAD[words] in refusal(tmp_path, run, Options, *tool(tmp_path / "out"), *words.split())


def test_the_formulas_by_loops():
    """The numbers of 2 members, 5 transitions and 3 dimensions, one of which is constant."""
    data = mbpo.Batch(*(torch.rand(9, *n).double() for n in [[3], [1], [], [3], []]))
    data.next_obs[:, 1] = data.obs[:, 1]
    batch = mbpo.Batch(*(part[:5] for part in data))
    mean, std = torch.rand(2, 2, 5, 4).double()
    script = SimpleNamespace(predict=lambda *_: (mean.clone(), std))
    found = measure({}, batch, data, script, None)
    v = [np.var(x) for x in [*(data.next_obs - data.obs).numpy().T, data.reward.numpy()]]
    error, spread, nll = np.zeros((3, 4))
    for e, b, i in np.ndindex(2, 5, 4):
        gap = float(mean[e, b, i] - (batch.next_obs[b, i] if i < 3 else batch.reward[b]))
        sigma, scale = float(std[e, b, i]), v[i] or np.nan
        error[i] += gap**2 / scale / 10
        spread[i] += sigma**2 / scale / 10
        nll[i] += ((gap / sigma) ** 2 + np.log(sigma**2 / scale)) / 10
    for name, expected in {"error": error, "spread": spread, "nll": nll}.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
        assert np.isnan(expected).tolist() == [False, True, False, False]
    rho = [np.corrcoef(data.obs[:, i], data.next_obs[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(found["rho"], [*rho, np.nan], rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 3])
def test_errors_are_those_of_the_scripts_fit(updates):
    """Of so many steps, though the fit goes on; on the rows that it holds out."""
    key = POLE, "random", "one fit", 2, "unit s'", 0.0, 7
    tables = fit(key, None, Options(transitions=40, budgets=(1, 3), compile=False))
    (found,) = tables["errors"].query("set == 'rows' and updates == @updates").to_dict("records")

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
    each = tables["dimensions"].query("set == 'rows' and updates == @updates")
    assert [*each.dimension] == ["s[0]", "s[1]", "s[2]", "s[3]", "r"]
    assert each.nll.mean() == pytest.approx(found["nll"])


def test_plan_of_later_fits():
    """Fits grow with the data, and are measured where asked."""
    how = {"transitions": 100, "later": 5, "first": 10, "every": 50, "at": (100, 200)}
    fits = [(100, 10), (150, 5), (200, 5)]
    assert plan(Options(**how)) == ("10, 5 every 50", fits, {10: 100, 20: 200})


def test_finished_fits_are_not_made_again(tmp_path, monkeypatch):
    """Another run adds what is missing, and shows all there is."""
    out, made = tmp_path / "out", []
    how = run, Options, *tool(out)
    assert call(*how, "--cells", "unit s'", "--dimensions")[0] == 0
    monkeypatch.setattr(mechanism, "fit", lambda *each: made.append(each[0]) or fit(*each))
    before = (out / "errors.csv").read_text()
    texts = [(out / f"{name}.md").read_text() for name in ("table", "rule")]
    assert call(*how, "--cells", "unit s'")[1] == "\n".join([*texts, ""])
    assert (made, (out / "errors.csv").read_text()) == ([], before)
    call(*how, "--cells", "unit s'", "raw s'")
    assert [key[4] for key in made] == ["raw s'"]
    later = "--later", 2, "--first", 1, "--every", 20, "--at", 40, 80
    shown = call(*how, "--cells", "unit s'", *later)[1]
    assert (shown.count("| 1, 2 every 20"), shown.count("| one fit")) == (2, 2)
    assert (out / "errors.csv").read_text().startswith(before)
    assert len(pd.read_csv(out / "dimensions.csv")) == 2 * 3 * 5


def test_table_and_rule_by_hand(tmp_path):
    """Means over seeds; within a quarter of the best, for reward and change, on how many tasks."""
    rewards = [0.9, 0.8, 1.0, 1.2, np.nan, np.nan, 3.0, 2.0]  # that of task b may never vary
    changes = [2.6, 2.0, 2.0, 2.4, 1.0, 1.2, 1.0, 1.0]
    fits, rows = product("ab", ("unit s'", "mbpo"), (100, 200)), []
    for (task, cell, n), reward, change in zip(fits, rewards, changes, strict=True):
        one = [task, "random", "one fit", 7, cell, 0.5, 1, 5000, n, "actions", reward + 0.1, change]
        rows += [one, [*one[:6], 2, *one[7:10], reward - 0.1, change]]
    columns = [*mechanism.FIT, *mechanism.PLACE, "reward", "change"]
    present(pd.DataFrame(rows, columns=columns), Options(out=tmp_path, shown=(200,)))
    table, rule = ((tmp_path / f"{x}.md").read_text().splitlines() for x in ("table", "rule"))
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in [*table, *rule]]
    assert lines[0] == ["task", "updates", "unit s', beta 0.5", "mbpo, beta 0.5"]
    assert lines[2:4] == [["a", "200", "0.8 / 2", "1.2 / 2.4"], ["b", "200", "nan / 1.2", "2 / 1"]]
    assert lines[4] == ["cell", "100", "200"]
    assert lines[6:] == [[name, "1 of 2", "2 of 2"] for name in lines[0][2:]]


def test_a_run_is_measured_with_its_policy(tmp_path):
    """New transitions, and new actions, by the sampled policy of its checkpoint."""
    how = {"learning_starts": 40, "total_timesteps": 40, "eval_frequency": 0, "compile": False}
    args = sac.Args(env_id=POLE, run_root=str(tmp_path), buffer_size=100, **how)
    params, folder = sac.train(args)["agent"]["actor"]["params"], tmp_path / f"{POLE}__sac__1"
    for part in collect(POLE, folder, 20):
        batch = batch_of(part.float(), POLE)
        mean, _ = sac.sample_action(params, batch.obs, 0.0)
        assert 1e-3 < (batch.action - mean).abs().max() < 0.2  # a new policy hardly varies
    words = *tool(tmp_path / "out"), "--tasks", "--checkpoints", folder, "--budgets", 1
    assert call(run, Options, *words)[0] == 0
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
    assert found == {"task": "task", "residual_over_reward": (1.25 + 4) / 2}
