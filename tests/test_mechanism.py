"""The instrument that measures why MBPO fails: its baselines, units, bookkeeping and statements."""

import shutil

import mechanism
import mechanism_fit as fits_of
import mechanism_report
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
TINY = {"transitions": 300, "budgets": (5, 10), "seeds": (1, 2), "hidden": 8, "compile": False}
POLE, TWO_POLES = "InvertedPendulum-v5", "InvertedDoublePendulum-v5"


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


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What one run on two small tasks, in a process of its own, leaves in its folder."""
    folder = tmp_path_factory.mktemp("mechanism") / "out"
    mechanism.run(mechanism.Options((POLE, TWO_POLES), out=folder, jobs=2, **TINY))
    return folder


@pytest.fixture(autouse=True)
def anew():
    """Threads and precision are set for each test, whatever tests of other tools have set."""
    fits_of.fitter.cache_clear()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run of 40 steps, all of them random."""
    root = tmp_path_factory.mktemp("runs")
    settings = {"env_id": POLE, "run_root": str(root), "total_timesteps": 40}
    few = {"learning_starts": 40, "eval_frequency": 0, "compile": False, "buffer_size": 100}
    sac.train(sac.Args(**settings, **few))
    return root / f"{POLE}__sac__1"


def contents(folder) -> dict[str, bytes]:
    """The CSV files and documents of a folder by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".png"}


def small_fit(x, y, cell: str, budgets: tuple[int, ...]) -> pd.DataFrame:
    """One fit of a small network, uncompiled; a row for each measurement."""
    return pd.DataFrame(fits_of.Fitter(x, y, 16, 1e-3, compiled=False).fit(cell, 1, budgets))


def test_baselines_are_the_least_squares_solutions(rows):
    """Against numpy's: one dimension on itself, and all on everything; a constant one stays so."""
    x, y = rows
    one = fits_of.baseline("per-dimension", x, y)
    for i in range(1, S):
        slope, offset = np.linalg.lstsq(x[:, [i, -1]].numpy(), y[:, i].numpy(), rcond=None)[0]
        assert one[i, i].item() == pytest.approx(slope, rel=1e-6)
        assert one[-1, i].item() == pytest.approx(offset, rel=1e-6)
        assert one[:, i].count_nonzero() == 2
    assert one[:, 0].tolist() == [0] * (S + A) + [2]
    assert not one[:, -1].any()  # the reward keeps its mean

    ridge = x @ fits_of.baseline("ridge", x, y)
    free = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge, x.numpy() @ free, atol=2e-4)


@pytest.mark.parametrize("cell", fits_of.CELLS)
def test_prediction_undoes_the_targets(rows, cell):
    """b + m + d y is [s', r], and what is fitted beforehand sees the training rows alone."""
    x, y = rows
    train = torch.arange(N // 2)
    problem = fits_of.pose(cell, x, y, train)
    undone = problem.base + problem.scaler[0] + problem.scaler[1] * problem.targets.double()
    torch.testing.assert_close(undone, y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(problem.inputs[train].mean(0), torch.zeros(S + A), atol=1e-5, rtol=0)
    elsewhere = y.clone()
    elsewhere[N // 2 :] *= 3
    again = fits_of.pose(cell, x, elsewhere, train)
    assert torch.equal(again.base, problem.base)
    assert torch.equal(torch.stack(again.scaler), torch.stack(problem.scaler))
    if cell.startswith("normalized"):
        spread = problem.targets[train].std(0, correction=0)[1:]
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
    targets = script.model_targets(data, *options)
    if cell.startswith("normalized"):
        targets = script.normalize(targets, script.fit_scaler(targets[train]))
    inputs = torch.cat([obs, action], -1)
    problem = fits_of.pose(cell, x, y, train)
    assert torch.equal(problem.targets, targets)
    assert torch.equal(problem.inputs, script.normalize(inputs, script.fit_scaler(inputs[train])))


def test_ridge_leaves_nothing_of_a_linear_task(rows):
    """Untrained, only its noise is left; what the residual's network has to learn is far more."""
    x, _ = rows
    weights = torch.randn(S + A + 1, S + 1, generator=torch.Generator().manual_seed(1))
    y = x @ weights.double()
    names = ("normalized ridge", "normalized direct")
    ridge, direct = (small_fit(x, y, name, (1,)).loc[0] for name in names)
    assert ridge[["state_error", "reward_error"]].max() < 1e-6
    assert direct[["state_error", "reward_error"]].min() > 0.5
    assert fits_of.measure_scales(x, y)[0]["ridge_leaves_of_reward"] < 1e-6


def test_scales_by_hand():
    """Three transitions of two dimensions, one of which inflates, and a third that is constant."""
    s = np.array([[0.0, 1, 5], [1, -1, 5], [2, 0, 5]])
    s_next = np.array([[1, -0.2, 5], [2, 0.2, 5], [4, 0, 5]])  # Var(s' - s) is 1.44 Var(s)
    x = torch.tensor(np.hstack([s, np.zeros((3, 1)), np.ones((3, 1))]))
    y = torch.tensor(np.hstack([s_next, [[0], [0.3], [0]]]))
    scales, dimensions = fits_of.measure_scales(x, y)
    dimensions = dimensions.to_dict("records")
    changes = s_next - s
    assert (scales["state_dims"], scales["varying_dims"]) == (3, 2)
    assert scales["reward_variance"] == pytest.approx(0.02)
    assert scales["residual_over_reward"] == pytest.approx(changes.var(0).sum() / 0.02)
    assert scales["direct_over_reward"] == pytest.approx(s_next.var(0).sum() / 0.02)
    assert scales["inflated_share"] == 0.5
    for i in (0, 1):
        assert dimensions[i]["rho"] == pytest.approx(np.corrcoef(s[:, i], s_next[:, i])[0, 1])
        assert dimensions[i]["inflation"] == pytest.approx(changes[:, i].var() / s[:, i].var())
    assert scales["rho_min"] == pytest.approx(dimensions[1]["rho"])


def test_errors_by_hand(rows):
    """Errors, spread and shares of an untrained network against numpy, in both units."""
    x, y = rows
    holdout = torch.arange(80)
    problem = fits_of.pose("normalized direct", x, y, torch.arange(80, N))
    held = problem.rows(holdout)
    net = fits_of.mbrl.Ensemble(1, S + A, S + 1, 16)
    params = {name: param.detach() for name, param in net.named_parameters()}
    found = fits_of.measure(net, params, held, fits_of.units(x, y))

    mean, log_var = (part[0].detach().double().numpy() for part in net(held.inputs[None]))
    center, scale = (part.double().numpy() for part in problem.scaler)
    error = ((center + scale * mean - held.y.numpy()) ** 2).mean(0)
    noise = (scale**2 * np.exp(log_var)).mean(0)
    variance, change = y.numpy().var(0), (y[:, :S] - x[:, :S]).numpy().var(0)
    live = slice(1, S)  # the first is constant
    assert found["reward_error"] == pytest.approx(error[-1] / variance[-1], rel=1e-4)
    assert found["reward_sampled"] == pytest.approx((error + noise)[-1] / variance[-1], rel=1e-4)
    assert found["reward_spread"] == pytest.approx(np.sqrt(noise / error)[-1], rel=1e-4)
    sampled = (error + noise)[live] / variance[live]
    assert found["by_dimension"] == pytest.approx(sampled, rel=1e-4)
    assert found["state_sampled"] == pytest.approx(sampled.mean(), rel=1e-4)
    assert found["state_sampled_worst"] == pytest.approx(sampled.max(), rel=1e-4)
    assert found["change_error"] == pytest.approx((error[live] / change[live]).mean(), rel=1e-4)
    of_change = (error[live] / change[live], (error + noise)[live] / change[live])
    assert found["change_error_by_dimension"] == pytest.approx(of_change[0], rel=1e-4)
    assert found["change_by_dimension"] == pytest.approx(of_change[1], rel=1e-4)
    weighted = ((mean - held.targets.numpy()) ** 2 / np.exp(log_var)).mean(0)
    share = weighted[-1] / weighted.sum()
    assert found["reward_share_of_loss"] == pytest.approx(share, rel=1e-4)
    scaled = held._replace(targets=held.targets * torch.tensor([1e3] * S + [1]))
    swamped = fits_of.measure(net, params, scaled, fits_of.units(x, y))
    share = "reward_share_of_gradient"
    assert swamped[share] < 1e-3 < 0.02 < found[share] < 1


def test_a_fit_learns_and_budgets_nest(rows):
    """Errors fall; what is measured at a budget does not depend on the budgets after it."""
    x, y = rows
    long = small_fit(x, y, "normalized residual", (20, 400))
    assert long.updates.tolist() == [0, 20, 400]
    assert long.reward_error[2] < 0.5 * long.reward_error[0]
    assert long.state_sampled[2] < 0.5 * long.state_sampled[0]
    pd.testing.assert_frame_equal(small_fit(x, y, "normalized residual", (20,)), long[:2])


def test_batches_are_those_of_the_scripts(rows):
    """Each epoch is the bootstrap sample in a new order, its end filled up from the front."""
    fitter, seen = fits_of.Fitter(*rows, 16, 1e-3, compiled=False), []

    def update(learner, inputs, targets):
        seen.append(inputs[0])
        return learner, None

    fitter.update = update
    fitter.fit("raw direct", 1, (4,))
    assert {batch.shape for batch in seen} == {(256, S + A)}
    epochs = [torch.cat(seen[first : first + 2]) for first in (0, 2)]  # 480 rows to train on
    ordered = []
    for epoch in epochs:
        assert torch.equal(epoch[480:], epoch[:32])
        ordered.append(epoch[:480][epoch[:480, -1].argsort()])
    assert torch.equal(*ordered)
    assert not torch.equal(*epochs)
    assert 0.5 < len(ordered[0].unique(dim=0)) / 480 < 0.75  # drawn with replacement: 1 - 1 / e


def test_a_constant_reward_has_no_figures(rows):
    """Nothing is divided by zero: figures of the reward are left out, those of states are there."""
    x, y = rows
    y[:, -1] = 1.0
    last = small_fit(x, y, "normalized direct", (1,)).iloc[-1]
    assert last[[name for name in last.index if name.startswith("reward")]].isna().all()
    assert np.isfinite(last.state_sampled)
    assert np.isnan(fits_of.measure_scales(x, y)[0]["residual_over_reward"])


def test_actions_and_resets_are_those_of_training():
    """Uniform actions, and the trained policy's where an actor is given; episodes begin anew."""
    x, y = fits_of.collect(POLE, None, 200)
    assert x.shape == (200, 6)
    assert y.shape == (200, 5)
    first = mbpo.make_env(POLE).reset(seed=mbpo.derive_seed(fits_of.DATA_SEED, 0, 0))[0]
    np.testing.assert_allclose(x[0, :4], first, atol=1e-6)
    assert -1 <= x[:, 4].min() < -0.9 < 0.9 < x[:, 4].max() <= 1
    restarts = (x[1:, :4] != y[:-1, :4]).any(1)
    assert 3 < restarts.sum() < 100
    assert x[1:, :4][restarts].abs().max() < 0.011  # where the pendulum begins

    actor = dict(mbpo.mlp(4, 2).state_dict())
    for name in actor:
        actor[name] *= 0
    actor["4.bias"][:] = torch.tensor([0.5, -9.0])  # of u: mean 0.5, and next to no noise
    x, _ = fits_of.collect(POLE, actor, 50)
    np.testing.assert_allclose(x[:, 4], np.tanh(0.5), atol=1e-2)


def test_finished_tasks_are_kept(out, run_folder, tmp_path, monkeypatch):
    """A task that was cut off is fitted again to the same bytes, a finished one is not.

    A trained policy's data get a section of their own.
    """
    folder = shutil.copytree(out, tmp_path / "out")
    fits = pd.read_csv(out / "fits.csv")
    assert len(fits) == 2 * len(fits_of.CELLS) * 2 * 3  # tasks, cells, seeds, measurements
    assert fits.groupby(["task", "cell", "updates"]).reward_error.nunique().min() == 2  # seeds
    scales = (folder / "scales.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in scales[1:]] == [TWO_POLES, POLE]
    (folder / "scales.csv").write_text("\n".join(scales[:2]) + "\n")  # cut off before its end
    options, done = mechanism.Options((POLE, TWO_POLES), out=folder, jobs=1, **TINY), []

    def fit_all(one, options):
        done.append(one.data)
        return fits_of.fit_all(one, options)

    monkeypatch.setattr(mechanism, "fit_all", fit_all)
    monkeypatch.setattr(mechanism_report, "draw_errors", lambda *_, **__: None)  # takes seconds
    for expected in (["random"], ["random"]):
        mechanism.run(options)
        assert done == expected
        assert contents(folder) == contents(out)
    options.checkpoints = (run_folder,)
    mechanism.run(options)
    assert done == ["random", run_folder.name]
    assert "so many updates, medians of 1\n" in (folder / "summary.md").read_text()
    assert f"## {POLE}, policy: {run_folder.name}" in (folder / "tables.md").read_text()


def test_slow_and_fast_dimensions(rows):
    """A dimension is slow if a step changes it little, by numpy; groups have mean and median."""
    x, y = rows
    s, change = x[:, :S].numpy(), (y[:, :S] - x[:, :S]).numpy()
    slow = (change.var(0) < 0.1 * s.var(0))[1:]  # the first is constant
    assert slow.tolist() == [True, True, False, True]
    by_dimension = {"change_by_dimension": [2.0, 3, 5, 7], "by_dimension": [1.0] * 4}
    figures = {"updates": 5} | by_dimension | {"change_error_by_dimension": [1.0, 1, 2, 4]}
    means = {"slow_dims": 3, "slow_error": 2, "slow_sampled": 4, "slow_sampled_median": 3}
    means |= {"fast_dims": 1, "fast_error": 2, "fast_sampled": 5, "fast_sampled_median": 5}
    assert fits_of.by_speed(figures, x, y) == {"updates": 5} | means


def test_a_buffer_is_read_as_the_scripts_write_it(run_folder):
    """s, a, r and s' of the first rows are those of the script's own buffer."""
    rows = torch.load(run_folder / "checkpoint.pt")["rows"]
    data = sac.ReplayBuffer(1, 4, 1, torch.device("cpu")).unpack(rows[:30])
    x, y = fits_of.read_buffer(run_folder, 30)
    assert torch.equal(x, torch.cat([data.obs, data.action, torch.ones(30, 1)], 1).double())
    assert torch.equal(y, torch.cat([data.next_obs, data.reward[:, None]], 1).double())
    begins = (x[1:, :4] != y[:-1, :4]).any(1)  # an episode; all others go on where they were
    assert 0 < begins.sum() < 15
    assert set(y[:, -1].tolist()) == {0.0, 1.0}  # the reward of the pendulum: 0 at its fall


def test_finished_fits_are_kept(run_folder, tmp_path, monkeypatch):
    """What is done is left out; then the same command presents it all."""
    options = {"transitions": 40, "hidden": 8, "budgets": (5, 10), "seeds": (1,), "compile": False}
    options |= {"lr": (1e-3, 3e-4), "out": tmp_path, "jobs": 1, "buffers": (run_folder,)}
    options, done = mechanism.Needed((), **options), []

    def fit_one(one, *fit):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(fit[:-1])
        return fits_of.fit_one(one, *fit)

    monkeypatch.setattr(mechanism, "fit_one", fit_one)
    with pytest.raises(KeyboardInterrupt):
        mechanism.run_needed(options)
    assert pd.read_csv(tmp_path / "fits.csv").groupby(mechanism.KEY).ngroups == 4
    first, done[:] = [*done], []
    mechanism.run_needed(options)
    wanted = {(lr, 1, cell) for lr in ("0.001", "0.0003") for cell in options.cells}
    assert {*first, *done} == wanted
    assert len(first) + len(done) == len(wanted)

    fits = pd.read_csv(tmp_path / "fits.csv")
    assert len(fits) == 6 * 3  # measurements
    ends = fits[fits.updates == 10].set_index(["data", "lr", "cell"]).state_error
    assert ends.nunique() == 6  # every fit is another
    assert {"needed.png", "needed_lr_0.0003.png"} < {file.name for file in tmp_path.iterdir()}
    said = (tmp_path / "needed.md").read_text()
    assert said.count(f"\n| {run_folder.name} ") == 2 * 3  # step sizes, parts
    options.budgets = (5,)
    with pytest.raises(mechanism.InputError, match="choose another"):
        mechanism.run_needed(options)


def test_updates_needed_of_made_up_curves():
    """The first measurement at which it holds, never, and what it ends with."""
    curves = {
        "residual": [2, 1, 0.5, 0.5],
        "direct": [2.5, 1.08, 0.46, 0.44],
        "ridge": [1, 2, 3, 4.0],
    }
    rows = []
    for kind, errors in curves.items():
        for updates, error in zip([10, 100, 1000, 2000], errors, strict=True):
            for seed, factor in ((1, 0.5), (2, 1.5)):
                row = {"task": POLE, "data": "random", "seed": seed, "updates": updates}
                row |= {"cell": f"normalized {kind}", "slow_sampled": factor * error}
                rows.append(
                    row
                    | {"reward_sampled": np.nan, "fast_sampled": factor}
                    | {"slow_dims": 1, "fast_dims": 1}
                )
    table = mechanism_report.table_needed(pd.DataFrame(rows)).set_index("sampled error of")
    slow = table.loc["slow dimensions"]
    assert slow["residual: below 1"] == slow["direct: below 1"] == "1,000"
    assert slow["ridge: below 1"] == "never (error 4 at 2,000)"
    assert slow["direct reaches residual"] == "100"
    assert slow["direct overtakes residual"] == "2,000"
    assert slow["ridge reaches residual"] == "10 (factor 8 at 2,000)"
    assert table.loc["fast dimensions", "direct reaches residual"] == "10"
    assert table.loc["fast dimensions", "direct overtakes residual"] == "never (factor 1 at 2,000)"
    assert set(table.loc["reward"][1:]) == {"-"}


def table_of_fits(**errors: list[float]) -> pd.DataFrame:
    """A fits.csv of two seeds, one budget and one task per number: error 1 but where given."""
    rows = []
    for task in range(len(next(iter(errors.values())))):
        for cell in fits_of.CELLS:
            for seed in (1, 2):
                error = errors.get(cell.replace(" ", "_"), [1.0] * 9)[task] + 0.3 * (seed == 2)
                row = {"task": f"task{task}", "data": "random", "cell": cell, "seed": seed}
                rows.append(row | {"updates": 10, "reward_sampled": error})
    return pd.DataFrame(rows)


def test_statements_count_what_the_table_holds():
    """Lower on two of three, by both seeds on one; a task without figures is not counted."""
    fits = table_of_fits(normalized_direct=[0.2, 1.2, 0.9, np.nan], raw_residual=[1, 1, 1, 1])
    torn = (fits.task == "task2") & (fits.cell == "normalized direct")
    fits.loc[torn, "reward_sampled"] = [0.5, 1.4]
    said = mechanism_report.compare(fits, "reward_sampled", "normalized direct", ["raw residual"])
    (line,) = said.to_dict("records")
    factor = np.median(np.array([0.35, 1.35, 0.95]) / 1.15)
    assert line.pop("median factor") == pytest.approx(factor)
    expected = {"updates": "10", "lower on": "2 of 3", "by every seed": "1", "not on": "task1"}
    assert line == expected
    fits = table_of_fits(normalized_residual=[0.1, 1.9, 0.9], normalized_ridge=[0.5, 0.5, 0.5])
    both = ["normalized residual", "normalized direct"]
    said = mechanism_report.compare(fits, "reward_sampled", "normalized ridge", both)
    assert said["lower on"].tolist() == ["2 of 3"]


def test_dimensions_are_counted_by_autocorrelation():
    """Direct pays in one of two dimensions below rho = 1/2, and in none above."""
    columns = {"rho": [-0.2, 0.1, 0.3, 0.95], "normalized residual": [1.0] * 4}
    columns |= {"normalized direct": [2, 0.5, 3, 4.0], "normalized per-dimension": [0.5] * 4}
    table = mechanism_report.by_autocorrelation(pd.DataFrame(columns | {"normalized ridge": 0.1}))
    assert table.dimensions.tolist() == [1, 2, 1]
    assert table["direct: lower in"].tolist() == [0, 1, 0]
    assert table["direct: median factor"].tolist() == [2, 1.75, 4]
    assert table["ridge: lower in"].tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--tasks dmc/walker-rum", "rum: no such task; did you mean dmc/walker-run"),
        ("--tasks CartPole-v1", "not Discrete"),
        ("--tasks", "name a task or a run folder"),
        (f"--tasks {POLE} --checkpoints {{out}}/nope", "nope: there is no checkpoint.pt in it"),
        (f"--tasks {POLE} --checkpoints {{out}}/damaged", "damaged: its checkpoint.pt is damaged"),
        ("--budgets 0 10", "--budgets must be at least 1"),
        ("--transitions 9", "--transitions must be at least 10"),
        (f"--tasks {POLE} --transitions 30 --out {{out}}", "transitions 300, not 30: choose"),
        (
            "updates-needed --tasks --buffers {run}",
            "holds 40 transitions, fewer than the 20000 to fit",
        ),
        ("updates-needed --tasks --transitions 40", "name a task or a run folder"),
        ("updates-needed --cells direct", "direct"),
    ],
)
def test_bad_input_is_one_line(out, run_folder, tmp_path, words, said):
    """It says what is wrong, ends with 2, and neither writes nor harms anything."""
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "checkpoint.pt").write_bytes(b"cut short")
    before = listing(tmp_path)
    default = "" if "--out" in words else f" --out {tmp_path}/new"
    words = (words.format(out=folder, run=run_folder) + default).split()
    if words[0] == "updates-needed":
        code, _, err = call(mechanism.run_needed, mechanism.Needed, *words[1:])
    else:
        code, _, err = call(mechanism.run, mechanism.Options, *words)
    assert code == 2
    assert said in one_error(err)
    assert listing(tmp_path) == before
