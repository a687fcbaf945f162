"""The ensemble, its loss, its fit and its rollouts against direct formulas."""

import copy
import math
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers_model import CPU, A, S, assert_close, assert_equal, flat, random_batch, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation

quick = settings(max_examples=300, deadline=None, derandomize=True)


class Cell(NamedTuple):
    """A script, its options, and whether it has targets at unit scale and predicts s' - s."""

    script: object
    options: dict
    scaled: bool
    residual: bool

    def args(self, **settings):
        """The script's arguments, for an ensemble of three with two elites."""
        settings = {"ensemble_size": 3, "num_elites": 2, "compile": False} | settings
        return self.script.Args(**self.options, **settings)

    def targets(self, data):
        """What the ensemble learns of transitions, before it is scaled."""
        more = [self.args()] if self.script is mbpo_residual_ablation else []
        return self.script.model_targets(data, *more)

    def fit(self, learner, data, updates: int, update, args):
        """The script's fit, with random numbers of a fixed seed."""
        return self.script.fit_ensemble(learner, data, updates, update, args, seeded())

    def learn(self, learner, data, updates: int, args):
        """A fit by the script's own update."""
        update = self.script.compiled_update(self.script.model_update, args)
        return self.fit(learner, data, updates, update, args)


NEITHER = {"normalize_targets": False, "predict_residual": False}
CELLS = {  # what may differ among the scripts is tested on each of these, all else on mbpo.py
    "mbpo": Cell(mbpo, {}, scaled=False, residual=True),
    "ftfl": Cell(mbpo_ftfl, {}, scaled=True, residual=False),
    "ablation": Cell(mbpo_residual_ablation, {}, scaled=True, residual=True),
    "neither": Cell(mbpo_residual_ablation, NEITHER, scaled=False, residual=False),
}


@pytest.fixture(params=CELLS.values(), ids=list(CELLS))
def cell(request):
    """Each way to learn a model."""
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def double():
    """Numbers in float64, so that a reference may be compared to some ten digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_ensemble(members: int = 4, hidden: int = 8) -> dict:
    """An ensemble's parameters, with biases and bounds away from their start."""
    params = mbpo.init_ensemble(members, S + A, S + 1, hidden)
    for _, bias in params["layers"]:
        bias.normal_()
    params["max_log_var"].uniform_(0, 1), params["min_log_var"].uniform_(-5, -3)
    return params


def make_model(cell) -> dict:
    """A model of four members with two elites, at made-up scales."""
    scaler = {"inputs": (torch.randn(S + A), torch.rand(S + A) + 0.5)}
    if cell.scaled:
        scaler["targets"] = (torch.randn(S + 1), torch.rand(S + 1) + 2)
    learner = mbpo.adam_init(make_ensemble(), CPU)
    return {"learner": learner, "elites": torch.tensor([3, 1])} | scaler


def member_output(params: dict, e: int, x):
    """Mean and clamped log variance of one member, one layer after the other."""
    for i, (weight, bias) in enumerate(params["layers"]):
        x = x @ weight[e] + bias[e]
        x = x * torch.sigmoid(x) if i < 4 else x
    half, high, low = x.shape[1] // 2, params["max_log_var"], params["min_log_var"]
    upper = high - torch.log1p(torch.exp(high - x[:, half:]))
    return x[:, :half], low + torch.log1p(torch.exp(upper - low))


def test_ensemble_starts_from_a_truncated_normal():
    """Weights are within two of J's standard deviations 1 / (2 sqrt(fan in)); biases are zero."""
    params = mbpo.init_ensemble(7, 11, 4, 200)
    sizes = [(7, 11, 200), (7, 200, 200), (7, 200, 200), (7, 200, 200), (7, 200, 8)]
    for (weight, bias), size in zip(params["layers"], sizes, strict=True):
        assert (weight.shape, bias.shape) == (size, (7, 1, size[2]))
        unit = weight * 2 * math.sqrt(size[1])
        assert 1.95 < unit.abs().max() <= 2.0001
        assert abs(unit.std() - 0.8796) < 0.02  # of a normal cut off at two deviations
        assert not torch.equal(weight[0], weight[1])
        assert not bias.any()
    assert params["max_log_var"].tolist() == [0.5] * 4
    assert params["min_log_var"].tolist() == [-10.0] * 4


@pytest.mark.parametrize("shape", [(4, 6), (6,)], ids=["inputs of its own", "the same inputs"])
def test_every_member_is_a_network_of_its_own(shape):
    """Members compute four SiLU layers and a linear one, each with its own weights."""
    params, x = make_ensemble(), torch.randn(*shape, S + A)
    mean, log_var = mbpo.ensemble(params, x)
    assert mean.shape == log_var.shape == (4, 6, S + 1)
    for e in range(4):
        own = member_output(params, e, x[e] if len(shape) == 2 else x)
        assert_close((mean[e], log_var[e]), own)


def test_log_variance_stays_between_its_bounds():
    """However far out the network says it is, the log variance stops at the nearer bound."""
    params = mbpo.init_ensemble(1, 2, 2, 4)
    params["layers"][4][0].zero_(), params["layers"][4][1].copy_(torch.tensor([0, 0, -1e4, 1e4]))
    low, high = mbpo.ensemble(params, torch.randn(1, 1, 2))[1].flatten().tolist()
    assert low == pytest.approx(-10)
    assert high == pytest.approx(0.5, abs=1e-4)  # lifted by the lower clamp, by log(1 + e^-10.5)


def loss_by_torch(params: dict, x, y, beta: float):
    """The loss by torch's Gaussian likelihood, which has a 1/2 that ours has not, per member.

    Each number is weighted by sigma^(2 beta), of which no gradient is taken.
    """
    likelihood = nn.GaussianNLLLoss(eps=1e-12, reduction="none")
    total = 0.01 * sum(params["max_log_var"]) - 0.01 * sum(params["min_log_var"])
    for e in range(len(x)):
        mean, log_var = member_output(params, e, x[e])
        sigma = log_var.detach().exp().sqrt()
        weighted = sigma ** (2 * beta) * 2 * likelihood(mean, y[e], torch.exp(log_var))
        total = total + weighted.mean()
    rates = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
    for rate, (weight, _) in zip(rates, params["layers"], strict=True):
        total = total + sum(rate * (member**2).sum() / 2 for member in weight)
    return total


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_model_update_is_that_of_an_eager_reference(beta):
    """Thirty updates give the losses and parameters of a plain loop with torch's Adam."""
    params, args = make_ensemble(), mbpo.Args(model_lr=3e-3, model_beta=beta)
    learner, reference = mbpo.adam_init(params, CPU), copy.deepcopy(params)
    leaves = [x.requires_grad_() for x in tree_leaves(reference)]
    optimizer = torch.optim.Adam(leaves, args.model_lr)
    for _ in range(30):
        x, y = torch.randn(4, 10, S + A), torch.randn(4, 10, S + 1)
        learner, loss = mbpo.model_update(learner, x, y, args)
        expected = loss_by_torch(reference, x, y, beta)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-8)
    expected = {path: x.detach() for path, x in flat(reference).items()}
    assert_close(flat(learner["params"]), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("double")
def test_model_update_is_pure_and_compiled_it_is_the_eager_one():
    """What goes in stays, all that comes out is new, and torch.compile's graph gives the same."""
    learner = mbpo.adam_init(make_ensemble(), CPU)
    x, y = torch.randn(4, 10, S + A), torch.randn(4, 10, S + 1)
    before, update = copy.deepcopy(learner), partial(mbpo.model_update, args=mbpo.Args())
    new, loss = update(learner, x, y)
    assert_equal(learner, before)
    assert not any(torch.equal(x, flat(new)[path]) for path, x in flat(learner).items())
    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    assert_close(compiled(learner, x, y), (new, loss), rtol=1e-6, atol=1e-8)
    torch.compiler.reset()


@pytest.mark.usefixtures("double")
def test_scaler_of_dimensions_that_vary():
    """Rows at unit scale have mean 0 and population deviation 1, whatever their units."""
    x = torch.randn(500, 4) * torch.tensor([1e-4, 1.0, 7.0, 1e4]) + torch.tensor([0, 3.0, -5, 9])
    mean, std = mbpo.fit_scaler(x)
    assert_close((mean, std**2), (x.sum(0) / 500, ((x - mean) ** 2).sum(0) / 500))
    unit = mbpo.normalize(x, (mean, std))
    assert_close((unit.mean(0), unit.square().mean(0)), (torch.zeros(4), torch.ones(4)))


@pytest.mark.parametrize("constant", [0.0, 0.3, 7.7, -1234.5, 1e-9])
@pytest.mark.parametrize("n", [3, 300, 4001])
def test_scale_of_a_constant_is_its_magnitude(constant, n):
    """A dimension that never changes is divided by its size, zero by 1, despite rounding."""
    x = torch.stack([torch.full((n,), constant), torch.randn(n)], 1)
    for rows in (x, x[:, :1].clone()):  # torch rounds sums of one column otherwise than of two
        mean, std = mbpo.fit_scaler(rows)
        assert std[0].item() == pytest.approx(abs(constant) or 1)
        torch.testing.assert_close(mean[0], torch.tensor(constant), rtol=1e-5, atol=1e-14)
        assert mbpo.normalize(rows, (mean, std))[:, 0].abs().max() <= 1e-5


@pytest.mark.parametrize(("spread", "untouched"), [(0.9e-3, False), (1.1e-3, True)])
@pytest.mark.parametrize("size", [-50.0, 1e-3])
def test_scale_of_what_hardly_varies_is_its_magnitude(spread, untouched, size):
    """Below 1/1000 of the largest magnitude the deviation is not trusted, above it it is."""
    x = torch.tensor([[size], [size - 2 * size * spread]], dtype=torch.float64)
    expected = spread * abs(size) if untouched else abs(size)
    assert mbpo.fit_scaler(x)[1].item() == pytest.approx(expected)


def test_targets_are_differences_or_next_states(cell):
    """What is learned is s' - s, or s' where the script says so; then r."""
    batch = random_batch(6)
    state = batch.next_obs - batch.obs if cell.residual else batch.next_obs
    assert torch.equal(cell.targets(batch), torch.cat([state, batch.reward[:, None]], 1))


def test_prediction_is_that_of_each_elite_in_the_tasks_units(cell):
    """Mean and deviation of s' and r, elite by elite: unscaled, and added to s where learned so."""
    model, batch = make_model(cell), random_batch(6)
    params, (m, d) = model["learner"]["params"], model["inputs"]
    actual = cell.script.predict(model, batch.obs, batch.action, cell.args())
    x, (means, stds) = (torch.cat([batch.obs, batch.action], 1) - m) / d, ([], [])
    for elite in (3, 1):
        mean, log_var = member_output(params, elite, x)
        std = torch.exp(log_var).sqrt()
        if cell.scaled:
            shift, scale = model["targets"]
            mean, std = mean * scale + shift, std * scale
        if cell.residual:
            mean = mean + torch.cat([batch.obs, torch.zeros(6, 1)], 1)
        means, stds = [*means, mean], [*stds, std]
    assert_close(actual, (torch.stack(means), torch.stack(stds)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", [[0] * 6, [1] * 6, [0, 1, 1, 0, 0, 1]])
def test_model_step_samples_from_the_chosen_elite(cell, choice):
    """The action is the policy's; s' and r are mean plus deviation times noise, of one elite."""
    model, actor = make_model(cell), mbpo.init_actor(S, A)
    obs, noise = torch.randn(6, S), (torch.randn(6, A), torch.randn(6, S + 1))
    parts = model, actor, obs, torch.tensor(choice), noise, cell.args()
    action, next_obs, reward = cell.script.model_step(*parts)
    torch.testing.assert_close(action, mbpo.sample_action(actor, obs, noise[0])[0])
    mean, std = cell.script.predict(model, obs, action, cell.args())
    for b, k in enumerate(choice):
        expected = mean[k, b] + std[k, b] * noise[1][b]
        torch.testing.assert_close(torch.cat([next_obs[b], reward[b][None]]), expected)


def test_errors_on_new_by_hand(cell):
    """Errors over elites and new transitions, in units of the variance over all transitions."""
    model, new, data = make_model(cell), random_batch(4), random_batch(9)
    mean, std = cell.script.predict(model, new.obs, new.action, cell.args())
    errors = cell.script.errors_on_new(model, new, data, cell.args())
    changes = data.next_obs - data.obs
    change_errors = []
    for d in range(S):  # E[(mean + std noise - s')^2] = (mean - s')^2 + std^2
        squares = (mean[..., d] - new.next_obs[:, d]) ** 2 + std[..., d] ** 2
        change_errors.append(squares.sum() / 8 / changes[:, d].var(correction=0))
    reward_squares, variance = (mean[..., -1] - new.reward) ** 2, data.reward.var(correction=0)
    expected = {
        "new_reward_error": reward_squares.sum() / 8 / variance,
        "new_change_error": sum(change_errors) / S,
        "new_reward_std_ratio": std[..., -1].sum() / 8 / variance.sqrt(),
    }
    assert_close(errors, expected)


def test_errors_on_new_are_of_transitions_not_fitted_yet(tmp_path, monkeypatch):
    """In a run, before each later fit, they are of all transitions since the last, and no other."""
    fitted, asked, logged = [], [], []

    def fit(learner, data, *rest, _fit=mbpo.fit_ensemble):
        fitted.append(data.obs.tolist())
        return _fit(learner, data, *rest)

    def errors(model, new, data, args):
        asked.append((new.obs.tolist(), data.obs.tolist()))
        return {"new_error": 0.0}

    def scalars(log, group, step, **values):
        logged.extend((step, name) for name in values if name == "new_error")

    for place, name, stand_in in [
        (mbpo, "fit_ensemble", fit),
        (mbpo, "errors_on_new", errors),
        (mbpo.Log, "scalars", scalars),
    ]:
        monkeypatch.setattr(place, name, stand_in)
    counts = {"total_timesteps": 60, "learning_starts": 25, "model_train_frequency": 15}
    counts |= {"model_first_updates": 2, "model_updates": 2, "model_hidden": 8}
    counts |= {"updates_per_step": 1, "batch_size": 20, "rollouts_per_step": 4}
    env = {"env_id": "InvertedPendulum-v5", "run_root": str(tmp_path), "device": "cpu"}
    mbpo.train(mbpo.Args(**env, **counts, compile=False, eval_frequency=0))
    assert [len(rows) for rows in fitted] == [25, 40, 55]
    assert asked == [(rows[-15:], rows) for rows in fitted[1:]]
    assert logged == [(40, "new_error"), (55, "new_error")]


@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_constant_reward_does_not_harm_the_fit(cell, reward):
    """A reward that never changes, in float32, leaves all numbers finite."""
    batch = random_batch(300)._replace(reward=torch.full((300,), reward))
    learner = mbpo.adam_init(make_ensemble(3), CPU)
    model, metrics = cell.learn(learner, batch, 20, cell.args())
    metrics |= cell.script.errors_on_new(model, batch, batch, cell.args())
    assert all(x.isfinite().all() for x in flat(model).values())
    assert all(math.isfinite(x) for x in metrics.values())
    if cell.scaled:
        assert model["targets"][1][-1].item() == pytest.approx(reward or 1)


class Fit:
    """A fit whose updates note the rows that they get, and set made-up weights.

    Actions are distinct numbers, by which rows can be told; all else is zero, so that a member
    that predicts a constant has its square as error.
    """

    def __init__(self, cell, errors: list[list[float]], n: int = 100, **settings):
        self.cell, self.errors, self.given = cell, torch.tensor(errors), []
        members, zero = self.errors.shape[1], torch.zeros(n)
        self.args = cell.args(**({"ensemble_size": members, "num_elites": 1} | settings))
        self.learner = mbpo.adam_init(mbpo.init_ensemble(members, 2, 2, 3), CPU)
        action = torch.arange(n, dtype=torch.float32)[:, None]
        self.data = mbpo.Batch(zero[:, None], action, zero, zero[:, None], zero)

    def update(self, learner, x, y):
        """Writes a row of the table as the members' errors, and the update's number all over."""
        self.given.append(x)
        number = len(self.given)
        for tensor in tree_leaves(learner["params"]):
            tensor.fill_(float(number))
        weight, bias = learner["params"]["layers"][4]
        weight.zero_()
        bias[:, 0] = self.errors[min(number, len(self.errors)) - 1].sqrt()[:, None]
        return torch.tensor(float(number))

    def run(self, updates: int):
        """Fits; returns the model and the metrics, and has `trained`, the rows [U, E, 256]."""
        model, metrics = self.cell.fit(self.learner, self.data, updates, self.update, self.args)
        mean, std = model["inputs"]
        self.trained = (torch.stack(self.given)[..., 1] * std[1] + mean[1]).round().long()
        return model, metrics


@pytest.mark.parametrize("updates", [2, 7])
def test_fit_takes_so_many_updates_and_elites_are_the_best_on_the_holdout(cell, updates):
    """Falling or rising errors do not end it; the last weights stay, and choose the elites."""
    errors = [[0.1, 0.2, 0.3, 0.4, 0.5], [3.0, 0.5, 2.0, 0.25, 1.0]]
    fit = Fit(cell, errors, num_elites=3)
    model, metrics = fit.run(updates)
    assert metrics["updates"] == metrics["loss"] == len(fit.given) == updates
    assert all(x.shape == (5, 256, 2) for x in fit.given)
    params = model["learner"]["params"]
    for tensor in (*params["layers"][0], params["max_log_var"]):
        assert tensor.eq(updates).all()
    assert model["elites"].tolist() == [3, 1, 4]
    assert metrics["holdout_mse"].item() == pytest.approx((0.25 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("n", "ratio", "size"),
    [(100, 0.2, 20), (103, 0.25, 25), (24_900, 0.2, 4980), (26_000, 0.2, 5000)],
)
def test_holdout_is_a_share_of_at_most_5000_and_never_trained_on(cell, n, ratio, size):
    """All others are met in long training of many members; errors and scales know which is which.

    The holdout's are the errors, the training split's the scales of inputs and targets.
    """
    fit = Fit(cell, [[1.0] * 24], n, holdout_ratio=ratio)
    fit.data = fit.data._replace(reward=torch.arange(n) / n, next_obs=torch.rand(n, 1))
    model, metrics = fit.run(2 + n // 250)
    train = fit.trained.unique()
    holdout = sorted(set(range(n)) - set(train.tolist()))
    assert len(holdout) == size
    assert holdout != list(range(size))  # nor simply the first
    assert holdout != list(range(n - size, n))  # or last
    targets = torch.stack([fit.data.next_obs[:, 0], fit.data.reward], 1)  # s is zero
    rows = {"inputs": torch.cat([fit.data.obs, fit.data.action], 1)} | {"targets": targets}
    assert ("targets" in model) == cell.scaled
    for name in ("inputs", "targets") if cell.scaled else ("inputs",):
        assert_close(model[name], mbpo.fit_scaler(rows[name][train]), rtol=1e-4, atol=1e-5)
    if cell.scaled:
        targets = mbpo.normalize(targets, model["targets"])
    torch.testing.assert_close(metrics["holdout_mse"], ((targets[holdout] - 1) ** 2).mean())


def test_every_member_has_a_bootstrap_sample_of_its_own(cell):
    """In 400 updates a member meets its 256 draws from 256 rows, each 400 times; none is alike."""
    fit = Fit(cell, [[1.0] * 3], 320)
    fit.run(400)
    samples = []
    for e in range(3):
        times = fit.trained[:, e].flatten().bincount(minlength=320) / 400
        samples.append(times.round())
        assert samples[e].sum() == 256
        assert (times - samples[e]).abs().max() < 0.4  # five standard deviations, of six draws even
        assert 130 < samples[e].count_nonzero() < 195  # 63 % of the rows, as with replacement
        assert not torch.equal(fit.trained[0, e].sort().values, fit.trained[1, e].sort().values)
    assert not torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_fit_with_patience_stops_early(cell):
    """Epochs of 720 rows are three updates; members go back to their best, elites are the best."""
    table = [[4.0, 9.0, 1.0], [5.0, 2.0, 3.0], *[[9.0] * 3] * 3]
    errors = [row for row in table for _ in range(3)]
    fit = Fit(cell, errors, 900, model_patience=2, num_elites=2)
    model, metrics = fit.run(1)
    assert len(fit.given) == 3 * (2 + 3)
    assert model["learner"]["params"]["layers"][0][1][:, 0, 0].tolist() == [3, 6, 3]
    assert metrics["updates"] == (3 + 6 + 3) / 3
    assert model["elites"].tolist() == [2, 1]
    assert metrics["holdout_mse"].item() == pytest.approx((1 + 2) / 2)


NAN = math.nan


@pytest.mark.parametrize(
    ("table", "patience", "epoch", "best"),  # holdout errors, a row per epoch; the last one stays
    [
        ([[4, 9, 1, 6], [5, 2, 3, 5], [8, 3, 3, 4], [9] * 4], 2, 5, [1, 2, 1, 3]),
        ([[1.0], [0.995], [0.98]], 0, 1, [1]),  # 0.5 % is no gain, and no patience is left
        ([[1.0], [0.995], [0.98]], 1, 1, [3]),
        ([[0.994**i] for i in range(9)], 2, 1, [9]),  # two times 0.6 % in a row are one
        ([[1, 1], [1, 1], [0.5, 1], [0.5, 1], [0.5, 0.5], [0.5, 0.5]], 1, 1, [3, 5]),  # in turns
        ([[1.0, 1.0], [NAN, 0.5], [NAN, NAN]], 2, 1, [1, 2]),
    ],
)
def test_stop_early_keeps_each_members_last_gain(table, patience, epoch, best, monkeypatch):
    """It ends `patience` + 1 epochs after the last gain of 1 %; members go back to their own.

    The bounds, which members share, are the last ones. NaN is no gain.
    """
    members, steps = len(best), []
    params = {"layers": [(torch.zeros(members, 2, 2), torch.zeros(members, 1, 2))]}
    params |= {"max_log_var": torch.zeros(2), "min_log_var": torch.zeros(2)}

    def learn(learner, batch):
        steps.append(batch)
        assert len(steps) < 1000
        for param in tree_leaves(params):
            param += 1
        return torch.tensor(len(steps))

    def errors(*_):
        return torch.tensor(table[min(len(steps) // epoch, len(table)) - 1]).float()

    monkeypatch.setattr(mbpo, "member_errors", errors)
    batches = ((number,) for number in range(1000))
    args = mbpo.Args(model_patience=patience)
    loss, kept = mbpo.stop_early({"params": params}, batches, epoch, None, None, learn, args)
    last = epoch * (max(best) + patience + 1)
    assert steps == list(range(last))
    assert loss == last
    for tensor in params["layers"][0]:
        assert tensor.eq(epoch * torch.tensor(best)[:, None, None]).all()
    assert params["max_log_var"].eq(last).all()
    assert kept.item() == pytest.approx(epoch * sum(best) / members)


schedules = st.tuples(
    st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 50), st.integers(1, 50)
)


@quick
@given(schedule=schedules, share=st.fractions(-1, 2))
def test_rollout_horizon_is_on_the_line(schedule, share):
    """Between START and END it is the line's whole part; before and after, FROM and TO."""
    start, length, low, high = schedule
    step = max(0, start + math.floor(share * length))
    x = min(max(Fraction(step - start, length), Fraction(0)), Fraction(1))
    expected = math.floor(low + x * (high - low))
    assert mbpo.rollout_horizon(step, (start, start + length, low, high)) == expected


class Walk:
    """A scripted model: state (branch, steps so far); notes what it is given."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.calls, self.asked = torch.tensor(lengths), [], []
        self.model = {"elites": torch.arange(3)}

    def step(self, model, actor, obs, choice, noise):
        """One step on; the action tells the step, the reward the branch and the step."""
        assert (model, actor) == (self.model, "actor")
        self.calls.append((obs, choice, noise))
        next_obs = obs + torch.tensor([0.0, 1.0])
        return next_obs[:, 1:].expand(-1, 3) / 10, next_obs, 100 * obs[:, 0] + obs[:, 1]

    def terminates(self, obs, action, next_obs):
        """Branch b ends with its step lengths[b], and would not with any later one."""
        self.asked.append((obs, action, next_obs))
        return next_obs[:, 1] == self.lengths[next_obs[:, 0].long()]

    def rollout(self, horizon: int):
        """Rows of a rollout from every branch's start."""
        n = len(self.lengths)
        obs = torch.stack([torch.arange(n), torch.zeros(n)], 1)
        starts = mbpo.Batch(obs, torch.zeros(n, 3), torch.zeros(n), obs + 7, torch.ones(n))
        parts = self.model, "actor", starts, horizon, self.step, self.terminates, seeded()
        return mbpo.rollout(*parts)


def test_rollout_branches_stop_where_they_terminate():
    """A branch's rows end with its termination, marked as such; the others go on to the end.

    Model and condition get the states that the last step predicted.
    """
    walk, expected = Walk([1, 3, 99, 2, 4]), []
    rows = walk.rollout(4)
    for t, (call, asked) in enumerate(zip(walk.calls, walk.asked, strict=True)):
        obs = torch.tensor([[branch, t] for branch in range(5)]).float()
        action, after = torch.full((5, 3), (t + 1) / 10), obs + torch.tensor([0, 1])
        assert_equal((call[0], *asked), (obs, obs, action, after))
        for branch, length in enumerate([1, 3, 99, 2, 4]):
            if t < length:
                action, end = [(t + 1) / 10] * 3, float(t + 1 == length)
                expected.append([branch, t, *action, 100 * branch + t, branch, t + 1, end])
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float32))


def test_every_branch_draws_an_elite_and_noise_at_every_step():
    """Elites are drawn evenly, anew for each branch and step; so is the noise."""
    walk = Walk([99] * 2000)
    walk.rollout(3)
    choices = torch.stack([choice for _, choice, _ in walk.calls])
    assert choices.shape == (3, 2000)
    for t in range(3):
        counts = choices[t].bincount(minlength=3)
        assert len(counts) == 3
        assert (counts - 2000 / 3).abs().max() < 110  # five standard deviations
        agree = (choices[t] == choices[t - 1]).float().mean()
        assert abs(agree - 1 / 3) < 0.053  # another draw than at the step before
    for part in (0, 1):  # the action's; the model's, of S + 1 = 3
        noise = torch.stack([call[2][part] for call in walk.calls])
        assert noise.shape == (3, 2000, 3)
        assert noise.unique().numel() > 0.99 * noise.numel()
        assert abs(noise.mean()) < 0.04
        assert abs(noise.std() - 1) < 0.03


def truth(obs, action):
    """s' and r of a simple task with small, nonlinear steps."""
    next_obs = obs + 0.3 * torch.tanh(obs.roll(1, -1)) + 0.3 * action.sum(-1, keepdim=True)
    return next_obs, torch.tanh(obs[:, 0]) + action[:, 0]


def test_ensemble_learns_a_simple_task(cell):
    """Within 150 updates nine tenths of the variance are explained, and rollouts are close."""
    obs, action = torch.randn(2500, S), torch.rand(2500, A) * 2 - 1
    next_obs, reward = truth(obs, action)
    data = mbpo.Batch(obs, action, reward, next_obs, torch.zeros(2500))
    seen, new = (mbpo.Batch(*[x[part] for x in data]) for part in (slice(2000), slice(2000, 2500)))
    args = cell.args(model_lr=3e-3, never_terminates=True)
    learner = mbpo.adam_init(mbpo.init_ensemble(3, S + A, S + 1, 64), CPU)
    model, _ = cell.learn(learner, seen, 150, args)
    errors = cell.script.errors_on_new(model, new, seen, args)
    assert errors["new_reward_error"] < 0.1
    assert errors["new_change_error"] < 0.3
    actor, never = mbpo.init_actor(S, A), mbpo.termination_function(args)
    step, starts = partial(cell.script.model_step, args=args), mbpo.Batch(*[x[:200] for x in new])
    rows = mbpo.rollout(model, actor, starts, 2, step, never, seeded())
    made = mbpo.ReplayBuffer(1, S, A, CPU).unpack(rows)
    assert len(rows) == 400
    assert torch.equal(made.obs[:200], starts.obs)
    assert torch.equal(made.obs[200:], made.next_obs[:200])
    assert (made.next_obs - truth(made.obs, made.action)[0])[:200].square().mean() < 0.1
