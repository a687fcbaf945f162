"""The instrument that measures why MBPO fails: its baselines, units, bookkeeping and statements."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import mechanism
import mechanism_fit as fits_of
import numpy as np
import pandas as pd
import pytest
import torch
from helpers_run import listing, one_error
from helpers_tools import call

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation
import sac

S, A, N = 5, 2, 600
POLE = "InvertedPendulum-v5"
TINY = {"transitions": 40, "budgets": (1, 2), "seeds": (1,), "compile": False, "jobs": 1}


@pytest.fixture
def rows():
    """Made-up x = [s, a, 1] and y = [s', r], float64 of float32, with a constant dimension 0."""
    random = np.random.default_rng(1)
    s, a = random.normal(size=(N, S)) * [0, 1, 10, 0.1, 3] + 2, random.uniform(-1, 1, (N, A))
    s_next = s + 0.3 * np.tanh(s[:, ::-1]) + 0.01 * random.normal(size=(N, S))
    reward = 1e-2 * np.tanh(s[:, 1] + a[:, 0])
    s_next[:, 0] = 2
    x = torch.as_tensor(np.hstack([s, a, np.ones((N, 1))])).float().double()
    return x, torch.as_tensor(np.hstack([s_next, reward[:, None]])).float().double()


@pytest.fixture(autouse=True)
def anew():
    """Threads and precision are set for each test, whatever tests of other tools have set."""
    fits_of.network.cache_clear()
    fits_of.transitions_of.cache_clear()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run of 40 steps, all of them random."""
    root = tmp_path_factory.mktemp("runs")
    settings = {"env_id": POLE, "run_root": str(root), "total_timesteps": 40}
    few = {"learning_starts": 40, "eval_frequency": 0, "compile": False, "buffer_size": 100}
    sac.train(sac.Args(**settings, **few))
    return root / f"{POLE}__sac__1"


@pytest.fixture
def fit(rows, monkeypatch):
    """Makes an uncompiled fit to made-up rows; returns its tables."""

    def of_rows(cell: str, budgets: tuple[int, ...], rows=rows, lr: str = "0.001") -> dict:
        monkeypatch.setattr(fits_of, "transitions_of", lambda *_: rows)
        options = SimpleNamespace(buffer=False, transitions=N, budgets=budgets, compile=False)
        return fits_of.fit("task", None, lr, 1, cell, options)

    return of_rows


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures, which take seconds, are left out; returns the errors that they would show."""
    drawn = {}
    monkeypatch.setattr(mechanism, "draw", lambda errors, file: drawn.update({file.name: errors}))
    return drawn


def test_baselines_are_the_least_squares_solutions(rows):
    """Against numpy's: one dimension on itself, and all on everything; a constant one stays so."""
    x, y = rows
    one = fits_of.baseline("per-dimension", x, y)
    for i in range(1, S):
        slope, offset = np.linalg.lstsq(x[:, [i, -1]].numpy(), y[:, i].numpy(), rcond=None)[0]
        assert one[i, i].item() == pytest.approx(slope, rel=1e-5)
        assert one[-1, i].item() == pytest.approx(offset, rel=1e-5, abs=1e-5)
        assert one[:, i].count_nonzero() == 2
    assert one[:, 0].tolist() == [0] * (S + A) + [2]
    assert one[:, -1].tolist() == [0] * (S + A) + [y[:, -1].mean()]

    ridge = x @ fits_of.baseline("ridge", x, y)
    free = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge, x.numpy() @ free, atol=2e-4)


@pytest.mark.parametrize("cell", fits_of.CELLS)
def test_prediction_undoes_the_targets(rows, cell):
    """b + m + d y is [s', r], and what is fitted beforehand sees the training rows alone."""
    x, y = rows
    train = torch.arange(N // 2)
    inputs, targets, base, (m, d) = fits_of.pose(cell, x, y, train)
    torch.testing.assert_close(base + m + d * targets.double(), y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs[train].mean(0), torch.zeros(S + A), atol=1e-5, rtol=0)
    elsewhere = y.clone()
    elsewhere[N // 2 :] *= 3
    _, _, *again = fits_of.pose(cell, x, elsewhere, train)
    assert torch.equal(again[0], base)
    assert torch.equal(torch.stack(again[1]), torch.stack([m, d]))
    if cell.startswith("normalized"):
        spread = targets[train].std(0, correction=0)[1:]
        torch.testing.assert_close(spread, torch.ones(S), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("cell", "script", "options"),
    [
        ("raw residual", mbpo, ()),
        ("normalized direct", mbpo_ftfl, ()),
        ("normalized residual", mbpo_residual_ablation, (True,)),
        ("raw direct", mbpo_residual_ablation, (False,)),
    ],
)
def test_the_four_cells_are_the_scripts(rows, cell, script, options):
    """Inputs and targets are, bit for bit, those of the script's own functions."""
    x, y = rows
    train, (obs, action) = torch.arange(100, N), x[:, :-1].float().split([S, A], 1)
    data = script.Batch(obs, action, y[:, -1].float(), y[:, :-1].float(), torch.zeros(N))
    expected = script.model_targets(data, *options)
    if cell.startswith("normalized"):
        expected = script.normalize(expected, script.fit_scaler(expected[train]))
    both = torch.cat([obs, action], -1)
    inputs, targets, _, _ = fits_of.pose(cell, x, y, train)
    assert torch.equal(targets, expected)
    assert torch.equal(inputs, script.normalize(both, script.fit_scaler(both[train])))


def test_ridge_leaves_nothing_of_a_linear_task(rows, fit):
    """Hardly trained, only noise is left; what the network has to learn otherwise is far more."""
    x, _ = rows
    weights = torch.randn(S + A + 1, S + 1, generator=torch.Generator().manual_seed(1))
    linear = x, x @ weights.double()
    ridge = fit("normalized ridge", (1,), linear)
    errors = ["state_error", "reward_error"]
    assert ridge["fits"][errors].max(axis=None) < 1e-6
    assert fit("normalized direct", (1,), linear)["fits"][errors].min(axis=None) > 0.5
    assert ridge["scales"].ridge_leaves_of_reward[0] < 1e-6


def test_scales_and_units_by_hand():
    """Two dimensions, a step changes one little and one more, and a third that is constant."""
    s = np.array([[0.0, 1, 5], [1, -1, 5], [2, 0, 5]])
    s_next = np.array([[0.1, 0.6, 5], [1, -0.6, 5], [2.2, 0, 5]])  # changes by 0.01, 0.16 Var(s)
    x = torch.tensor(np.hstack([s, np.zeros((3, 1)), np.ones((3, 1))]))
    y = torch.tensor(np.hstack([s_next, [[0], [0.3], [0]]]))
    scales, rho = fits_of.measure_scales(x, y)
    after, change, nan = s_next.var(0), (s_next - s).var(0), np.nan
    expected = {
        "reward": [nan, nan, nan, 0.02],
        "state": [*after[:2], nan, nan],
        "change": [*change[:2], nan, nan],
        "slow": [change[0], nan, nan, nan],
        "fast": [nan, change[1], nan, nan],
    }
    unit = fits_of.units(x, y)
    assert unit.keys() == expected.keys()
    for part, variances in expected.items():
        np.testing.assert_allclose(unit[part], variances, err_msg=part)
    assert scales["reward_variance"] == pytest.approx(0.02)
    assert scales["residual_over_reward"] == pytest.approx(change.sum() / 0.02)
    assert scales["direct_over_reward"] == pytest.approx(after.sum() / 0.02)
    correlations = [np.corrcoef(s[:, i], s_next[:, i])[0, 1] for i in (0, 1)]
    np.testing.assert_allclose(rho, [*correlations, nan, nan])


def test_errors_by_hand(rows, fit):
    """Those of a network as it begins, against numpy: of its mean, of its samples, in all units."""
    x, y = rows
    tables = fit("normalized direct", (1,), lr="0")
    found = tables["fits"].loc[0]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    holdout, train = order[: N // 5], order[N // 5 :]
    torch.manual_seed(1)
    net = mbpo.Ensemble(1, S + A, S + 1, mbpo.Args.model_hidden)
    inputs = x[:, :-1].float()
    inputs = mbpo.normalize(inputs, mbpo.fit_scaler(inputs[train]))
    mean, log_var = (part[0].detach().double().numpy() for part in net(inputs[holdout]))
    center, scale = (part.double().numpy() for part in mbpo.fit_scaler(y[train].float()))
    error = ((center + scale * mean - y[holdout].numpy()) ** 2).mean(0)
    sampled = error + (scale**2 * np.exp(log_var)).mean(0)
    variance, change = y.numpy().var(0), (y[:, :S] - x[:, :S]).numpy().var(0)
    slow = np.flatnonzero(change < 0.1 * x[:, :S].numpy().var(0))
    assert slow.tolist() == [1, 2, 4]
    units = {"reward": ([S], variance), "state": ([1, 2, 3, 4], variance)}
    units |= {"change": ([1, 2, 3, 4], change), "slow": (slow, change), "fast": ([3], change)}
    for part, (dims, unit) in units.items():
        for name, errors in {"error": error, "sampled": sampled}.items():
            expected = (errors[dims] / unit[dims]).mean()
            assert found[f"{part}_{name}"] == pytest.approx(expected, rel=1e-4), (part, name)
    assert tables["dimensions"].dimension.tolist() == [1, 2, 3, 4]
    assert tables["dimensions"].error.tolist() == pytest.approx((sampled / variance)[1:S], rel=1e-4)


def test_a_fit_learns_and_budgets_nest(fit):
    """Errors fall; what is measured at a budget does not depend on the budgets after it."""
    long = fit("normalized residual", (1, 60))["fits"]
    assert long.updates.tolist() == [1, 60]
    assert long.reward_error[1] < 0.5 * long.reward_error[0]
    assert long.state_sampled[1] < 0.5 * long.state_sampled[0]
    pd.testing.assert_frame_equal(fit("normalized residual", (1,))["fits"], long[:1])


def test_batches_are_epochs_of_a_bootstrap_sample():
    """Each epoch is the sample in a new order, its end filled up from the front."""
    batches = fits_of.batches(torch.arange(480), {"generator": torch.Generator().manual_seed(1)})
    epochs = [torch.cat([next(batches), next(batches)]) for _ in range(2)]
    assert all(torch.equal(epoch[480:], epoch[:32]) for epoch in epochs)
    assert torch.equal(*(epoch[:480].sort().values for epoch in epochs))
    assert not torch.equal(*epochs)
    assert 0.5 < len(epochs[0].unique()) / 480 < 0.75  # drawn with replacement: 1 - 1 / e


def test_a_constant_reward_has_no_figures(rows, fit):
    """Nothing is divided by zero: figures of the reward are left out, those of states are there."""
    x, y = rows
    y[:, -1] = 1.0
    tables = fit("normalized direct", (1,), (x, y))
    last = tables["fits"].iloc[-1]
    assert last[["reward_error", "reward_sampled"]].isna().all()
    assert np.isfinite(last.state_sampled)
    assert np.isnan(tables["scales"].residual_over_reward[0])


def test_actions_and_resets_are_those_of_training(monkeypatch):
    """Uniform actions, and the trained policy's where there is a run; episodes begin anew."""
    x, y = fits_of.transitions_of(POLE, None, False, 200)
    assert x.shape == (200, 6)
    assert y.shape == (200, 5)
    first = mbpo.make_env(POLE).reset(seed=mbpo.derive_seed(fits_of.DATA_SEED, 0, 0))[0]
    np.testing.assert_allclose(x[0, :4], first, atol=1e-6)
    assert -1 <= x[:, 4].min() < -0.9 < 0.9 < x[:, 4].max() <= 1
    restarts = (x[1:, :4] != y[:-1, :4]).any(1)
    assert 3 < restarts.sum() < 100
    assert x[1:, :4][restarts].abs().max() < 0.011  # where the pendulum begins

    actor = {name: 0 * param for name, param in mbpo.mlp(4, 2).state_dict().items()}
    actor["4.bias"][:] = torch.tensor([0.5, -9.0])  # of u: mean 0.5, and next to no noise
    monkeypatch.setattr(fits_of, "load_run", lambda folder: (POLE, actor, None))
    x, _ = fits_of.transitions_of(POLE, Path("run"), False, 50)
    np.testing.assert_allclose(x[:, 4], np.tanh(0.5), atol=1e-2)


def test_a_buffer_is_read_as_the_scripts_write_it(run_folder):
    """s, a, r and s' of the first rows are those of the script's own buffer."""
    rows = torch.load(run_folder / "checkpoint.pt")["rows"]
    data = sac.ReplayBuffer(1, 4, 1, torch.device("cpu")).unpack(rows[:30])
    x, y = fits_of.transitions_of(POLE, run_folder, True, 30)
    assert torch.equal(x, torch.cat([data.obs, data.action, torch.ones(30, 1)], 1).double())
    assert torch.equal(y, torch.cat([data.next_obs, data.reward[:, None]], 1).double())
    begins = (x[1:, :4] != y[:-1, :4]).any(1)  # an episode; all others go on where they were
    assert 0 < begins.sum() < 15
    assert set(y[:, -1].tolist()) == {0.0, 1.0}  # the reward of the pendulum: 0 at its fall


@pytest.mark.parametrize("kind", [mechanism.Options, mechanism.Needed])
def test_finished_fits_are_kept(kind, run_folder, tmp_path, monkeypatch, undrawn):
    """What a command that was cut off has done is not done again, and the end is the same bytes."""
    cells = kind.cells[:3]
    options = kind(tasks=(POLE,), runs=(run_folder,), cells=cells, lr=(1e-3, 3e-4), **TINY)
    done = []

    def fit(*words):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(words[:-1])
        return fits_of.fit(*words)

    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in options.out.iterdir()}

    monkeypatch.setattr(mechanism, "fit", fit)
    options.out, stop = tmp_path / "whole", -1
    mechanism.run(options)
    whole, every = files(), {*done}
    assert len(every) == len(done) == 2 * 2 * 3  # data sets, step sizes
    fits = pd.read_csv(options.out / "fits.csv")
    assert fits.state_error.nunique() == len(fits) == 2 * len(every)  # measurements
    assert len(pd.read_csv(options.out / "scales.csv")) == 2

    options.out, stop, done[:] = tmp_path / "parts", 3, []
    with pytest.raises(KeyboardInterrupt):
        mechanism.run(options)
    stop = -1
    for _ in range(2):
        mechanism.run(options)
    assert {*done} == every
    assert len(done) == len(every)
    assert files() == whole


@pytest.fixture
def recorded(tmp_path):
    """A copy of the recorded results of a mode, which have more columns or fewer than today's."""

    def copied(name: str) -> Path:
        shutil.copytree(mechanism.RESULTS / name, tmp_path / name)
        return tmp_path / name

    return copied


def test_recorded_results_are_presented_and_kept(recorded, undrawn, monkeypatch):
    """Those of older columns, too: finished fits are skipped, and new ones stand beside them."""
    monkeypatch.setattr(mechanism, "fit", None)
    out = recorded("mechanism")
    mechanism.run(mechanism.Options(jobs=1, out=out))
    said = (out / "summary.md").read_text()
    assert "| 14 of 15 (0.54) " in said  # data sets where to normalize s' - s helps the change
    assert len(undrawn["errors_state.png"]) == 18 * len(fits_of.CELLS) * 3 * 3
    before = pd.read_csv(out / "fits.csv")
    new = {"task": POLE, "data": "random", "lr": "0.001", "seed": 1, "cell": "raw direct"}
    mechanism.add(pd.DataFrame([new | {"updates": 300}]), out / "fits.csv")
    held = mechanism.read(out / "fits.csv")
    assert len(held) == len(before) + 1
    assert {*held.lr} == {"0.001"}

    out = recorded("updates_needed")
    fits = mechanism.read(out / "fits.csv")
    walker = fits[fits.task == "dmc/walker-run"]
    walker.to_csv(out / "fits.csv", index=False)
    mechanism.present_needed(out)
    words = (out / "summary.md").read_text().replace(" ", "")
    assert "|dmc/walker-run,alongtraining|s'|500/8,000(0.52)|" in words


def fits_table(errors: dict[str, list[list[float]]], **key) -> pd.DataFrame:
    """A fits.csv: by cell and seed, errors of the reward after 10, 100, ... updates."""
    key = {"task": POLE, "data": "random", "lr": "0.001"} | key
    rows = [
        key | {"cell": cell, "seed": seed, "updates": 10**i, "reward_sampled": error}
        for cell, seeds in errors.items()
        for seed, curve in enumerate(seeds, 1)
        for i, error in enumerate(curve, 1)
    ]
    return pd.DataFrame(rows).assign(state_sampled=np.nan, slow_sampled=np.nan, fast_sampled=1.0)


def test_updates_needed_of_made_up_curves(tmp_path, undrawn):
    """The first measurement at which it holds, or never, and how it ends; seeds are paired."""
    curves = {
        "normalized residual": [[2, 1, 0.5, 0.5], [2, 1, 0.5, 0.5], [9, 9, 9, 9]],
        "normalized direct": [[1, 1, 0.4, 0.4], [4, 1.16, 0.52, 0.48]],
        "normalized ridge": [[1, 2, 3, 4]],
    }
    fits_table(curves).to_csv(tmp_path / "fits.csv", index=False)
    mechanism.present_needed(tmp_path)
    _, _, _, direct, ridge = (tmp_path / "summary.md").read_text().strip().splitlines()[-5:]
    name, target, reward, slow, fast, seeds = direct.strip("| ").split("|")
    assert (name.strip(), target.strip()) == (f"{POLE}, random policy", "s'")
    assert reward.strip() == "100 / 10,000 (0.88)"
    assert (slow.strip(), fast.strip(), seeds.strip()) == ("", "10 / never (1.00)", "2")
    assert ridge.split("|")[3].strip() == "10 / 10 (8.00)"
    assert list(undrawn["needed.png"]["error of"].unique()) == ["reward", "fast dimensions"]


def test_statements_count_what_the_table_holds(tmp_path, undrawn):
    """Lower on two of three, as means of the seeds; what has no figure is not counted."""
    raw, tables = [[1.0], [1.6]], []
    for i, direct in enumerate([[[0.2], [0.5]], [[0.5], [1.8]], [[1.2], [1.5]], [[np.nan]]]):
        cells = {"raw residual": raw, "normalized direct": direct, "normalized residual": [[0.5]]}
        tables.append(fits_table(cells | {"normalized ridge": [[0.3]]}, task=f"task{i}"))
    fits = pd.concat(tables).assign(change_sampled=np.nan)
    fits.to_csv(tmp_path / "fits.csv", index=False)
    mechanism.present(tmp_path)
    said = (tmp_path / "summary.md").read_text()
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")]
    answers = {question.strip(): answer.strip() for question, answer in rows}
    assert answers["predict s' normalized, not s' - s raw"] == "2 of 3 (0.88)"
    assert answers["predict s', not s' - s, both normalized"] == "1 of 3 (1)"
    ridge = "predict what ridge regression leaves, not the better of these"
    assert answers[ridge] == "2 of 3 (0.6)"
    assert answers["normalize s' and r"] == ""


def test_data_sets_have_words(tmp_path):
    """A run is named where its task has several; a step size where it is not the scripts'."""
    curve, runs = {"normalized direct": [[1.0]]}, ("one__sac__1", "two__sac__1")
    tables = [fits_table(curve, data=run) for run in ("random", *runs)]
    tables.append(fits_table(curve, data="three__sac__1", task="Hopper-v5", lr="0.0003"))
    pd.concat(tables).to_csv(tmp_path / "fits.csv", index=False)
    errors = mechanism.read_errors(tmp_path, {"reward": "reward"}, "along training")
    assert set(errors["data set"]) == {
        f"{POLE}, random policy",
        f"{POLE}, along training (one__sac__1)",
        f"{POLE}, along training (two__sac__1)",
        "Hopper-v5, along training, lr 0.0003",
    }


def test_a_picture_is_drawn(tmp_path):
    """Of one part of two targets, one of which has two seeds."""
    curves = {"normalized residual": [[2, 1], [1, 0.5]], "normalized direct": [[2, 1.5]]}
    fits_table(curves).to_csv(tmp_path / "fits.csv", index=False)
    mechanism.present_needed(tmp_path)
    assert (tmp_path / "needed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tasks dmc/walker-rum", "rum: no such task; did you mean dmc/walker-run"),
        ("--tasks CartPole-v1", "not Discrete"),
        ("--tasks", "name a task or a run folder"),
        (f"--tasks {POLE} --checkpoints {{tmp}}/nope", "nope: no checkpoint.pt is there"),
        (f"--tasks {POLE} --checkpoints {{tmp}}/damaged", "damaged: no checkpoint.pt is there, or"),
        ("--budgets 0 10", "--budgets must be at least 1"),
        ("--seeds", "--seeds must be at least 0"),
        ("--transitions 9", "--transitions must be at least 10"),
        (f"--tasks {POLE} --transitions 30 --out {{tmp}}/out", "transitions [40]: choose another"),
        (f"--tasks {POLE} --transitions 40 --out {{tmp}}/out", "budgets [10]: choose another"),
        ("updates-needed --tasks --buffers {run}", "holds 40 transitions, not 20000"),
        ("updates-needed --tasks --transitions 40", "name a task or a run folder"),
        ("updates-needed --cells direct", "direct"),
    ],
)
def test_bad_input_is_one_line(run_folder, tmp_path, words, said):
    """It says what is wrong, ends with 2, and neither writes nor harms anything."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"cut short")
    (tmp_path / "out").mkdir()
    table = fits_table({"raw direct": [[1.0]]}).assign(transitions=40)
    table.to_csv(tmp_path / "out" / "fits.csv", index=False)
    before = listing(tmp_path)
    default = "" if "--out" in words else f" --out {tmp_path}/new"
    words = (words.format(tmp=tmp_path, run=run_folder) + default).split()
    needed = words[0] == "updates-needed"
    kind = mechanism.Needed if needed else mechanism.Options
    code, _, err = call(mechanism.run, kind, *words[needed:])
    assert code == 2
    assert said in one_error(err)
    assert listing(tmp_path) == before
