"""The ensemble, its loss, its fit and its rollouts against direct formulas."""

import copy
import math
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers_model import CPU, A, S, assert_close, flat, random_batch, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

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
        """The script's arguments."""
        return self.script.Args(**self.options, **settings)

    @property
    def flag(self) -> tuple:
        """What the ablation's functions take after those of the others."""
        return (self.residual,) if self.script is mbpo_residual_ablation else ()


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


def make_ensemble(members: int = 4, hidden: int = 8):
    """An ensemble with biases and bounds away from their start, and its learner."""
    net = mbpo.Ensemble(members, S + A, S + 1, hidden)
    with torch.no_grad():
        for bias in net.biases:
            bias.normal_()
        net.max_log_var.uniform_(0, 1)
        net.min_log_var.uniform_(-5, -3)
    return net, mbpo.adam_init(net, CPU)


def test_ensemble_starts_from_a_truncated_normal():
    """Weights are within two of J's standard deviations 1 / (2 sqrt(fan in)); biases are zero."""
    net = mbpo.Ensemble(7, 11, 4, 200)
    sizes = [(7, 11, 200), (7, 200, 200), (7, 200, 200), (7, 200, 200), (7, 200, 8)]
    assert [tuple(w.shape) for w in net.weights] == sizes
    assert [tuple(b.shape) for b in net.biases] == [(7, 1, size[2]) for size in sizes]
    for weight in net.weights:
        unit = weight.detach() * 2 * math.sqrt(weight.shape[1])
        assert 1.95 < unit.abs().max() <= 2.0001
        assert abs(unit.std() - 0.8796) < 0.02  # of a normal cut off at two deviations
        assert not torch.equal(weight[0], weight[1])
    assert not any(bias.any() for bias in net.biases)
    assert net.max_log_var.eq(0.5).all()
    assert net.min_log_var.eq(-10).all()


def test_every_member_is_a_network_of_its_own():
    """Members compute four SiLU layers and a linear one, each with its own weights and inputs."""
    net, _ = make_ensemble()
    x = torch.randn(4, 6, S + A)
    mean, log_var = net(x)
    assert mean.shape == log_var.shape == (4, 6, S + 1)
    for e in range(4):
        torch.testing.assert_close(mean[e], member_output(net, e, x[e])[0])
        torch.testing.assert_close(log_var[e], member_output(net, e, x[e])[1])


def member_output(net, e: int, x):
    """Mean and clamped log variance of one member, one layer after the other."""
    for i in range(5):
        x = x @ net.weights[i][e] + net.biases[i][e]
        x = x * torch.sigmoid(x) if i < 4 else x
    half = x.shape[1] // 2
    mean, raw = x[:, :half], x[:, half:]
    upper = net.max_log_var - torch.log1p(torch.exp(net.max_log_var - raw))
    return mean, net.min_log_var + torch.log1p(torch.exp(upper - net.min_log_var))


def test_log_variance_is_softly_clamped():
    """Log variances follow the formula inside, and stay at the bounds far outside."""
    net = mbpo.Ensemble(1, 2, 7, 4)
    raw = [-1e4, -20.0, -10.0, -4.0, 0.5, 3.0, 1e4]
    with torch.no_grad():
        net.weights[4].zero_()
        net.biases[4][0, 0] = torch.tensor([0.0] * 7 + raw)
    actual = net(torch.randn(1, 1, 2))[1].flatten().tolist()
    for value, given_value in zip(actual, raw, strict=True):
        upper = 0.5 - softplus(0.5 - given_value)
        assert value == pytest.approx(-10 + softplus(upper + 10), abs=1e-5)
        assert -10 <= value <= 0.5 + 1e-4  # the lower clamp lifts all by up to log(1 + e^-10.5)
    assert actual == sorted(actual)
    assert (actual[0], actual[-1]) == (pytest.approx(-10), pytest.approx(0.5, abs=1e-4))


def softplus(x: float) -> float:
    """log(1 + e^x), without overflow."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def test_every_member_may_get_the_same_inputs():
    """Inputs without the members' dimension are given to all of them."""
    net, _ = make_ensemble()
    x = torch.randn(6, S + A)
    mean, log_var = net(x)
    for e in range(4):
        torch.testing.assert_close(mean[e], member_output(net, e, x)[0])
        torch.testing.assert_close(log_var[e], member_output(net, e, x)[1])


def loss_by_torch(net, x, y):
    """The loss by torch's Gaussian likelihood, which has a 1/2 that ours has not, per member."""
    likelihood = nn.GaussianNLLLoss(eps=1e-12)
    total = 0.01 * sum(net.max_log_var) - 0.01 * sum(net.min_log_var)
    for e in range(len(x)):
        mean, log_var = member_output(net, e, x[e])
        total = total + 2 * likelihood(mean, y[e], torch.exp(log_var))
    for rate, weight in zip((2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), net.weights, strict=True):
        for member in weight:
            total = total + rate * (member**2).sum() / 2
    return total


@pytest.mark.usefixtures("double")
def test_model_update_is_that_of_an_eager_reference():
    """Thirty updates give the losses and parameters of a plain loop with torch's Adam."""
    net, learner = make_ensemble()
    reference, args = copy.deepcopy(net), mbpo.Args(model_lr=3e-3)
    optimizer = torch.optim.Adam(reference.parameters(), args.model_lr)
    for _ in range(30):
        x, y = torch.randn(4, 10, S + A), torch.randn(4, 10, S + 1)
        learner, loss = mbpo.model_update(learner, x, y, net, args)
        expected = loss_by_torch(reference, x, y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-8)
    parameters = {name: p.data for name, p in reference.named_parameters()}
    assert_close(learner["params"], parameters, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("double")
def test_compiled_update_is_the_eager_one():
    """The one graph that torch.compile makes gives the learner and loss of plain PyTorch."""
    net, learner = make_ensemble()
    x, y = torch.randn(4, 10, S + A), torch.randn(4, 10, S + 1)
    update = partial(mbpo.model_update, net=net, args=mbpo.Args())
    compiled = torch.compile(update, fullgraph=True, dynamic=False)
    assert_close(compiled(learner, x, y), update(learner, x, y), rtol=1e-6, atol=1e-8)
    torch.compiler.reset()


def test_model_update_changes_nothing_it_is_given():
    """The learner that goes in keeps its tensors; all of those that come out are new."""
    net, learner = make_ensemble()
    before, x, y = copy.deepcopy(learner), torch.randn(4, 9, S + A), torch.randn(4, 9, S + 1)
    new, _ = mbpo.model_update(learner, x, y, net, mbpo.Args())
    assert_close(learner, before, rtol=0, atol=0)
    assert not any(torch.equal(x, flat(new)[path]) for path, x in flat(learner).items())


def test_normalized_rows_have_unit_scale():
    """Every dimension gets mean 0 and standard deviation 1, whatever its units."""
    x = torch.randn(500, 4) * torch.tensor([1e-4, 1.0, 7.0, 1e4]) + torch.tensor([0, 3.0, -5, 9])
    unit = mbpo.normalize(x, mbpo.fit_scaler(x)).double()
    torch.testing.assert_close(unit.mean(0), torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(unit.square().mean(0), torch.ones(4).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.3, 7.7, -1234.5, 1e-9])
@pytest.mark.parametrize("n", [3, 300, 4001])
def test_constant_dimension_has_scale_one(constant, n):
    """A dimension that never changes is shifted and left at its scale, despite rounding."""
    x = torch.stack([torch.full((n,), constant), torch.randn(n)], 1)
    assert mbpo.fit_scaler(x)[1][1] != 1
    for rows in (x, x[:, :1].clone()):  # torch rounds sums of one column otherwise than of two
        mean, std = mbpo.fit_scaler(rows)
        assert std[0] == 1
        torch.testing.assert_close(mean[0], torch.tensor(constant), rtol=1e-5, atol=1e-8)
        assert mbpo.normalize(rows, (mean, std))[:, 0].abs().max() <= 1e-5 * abs(constant)


def test_targets_are_differences_or_next_states(cell):
    """What is learned is s' - s, or s' where the script says so; then r."""
    batch = random_batch(6)
    targets = cell.script.model_targets(batch, *cell.flag)
    state = batch.next_obs - batch.obs if cell.residual else batch.next_obs
    assert torch.equal(targets, torch.cat([state, batch.reward[:, None]], 1))


class Says(nn.Module):
    """A network that says the same whatever it is asked."""

    def __init__(self, *said):
        super().__init__()
        self.said = said

    def forward(self, x):
        return self.said if len(self.said) > 1 else self.said[0]


def test_model_step_undoes_targets(cell):
    """A model that is sure of the targets, at unit scale or not, gives s' and r again."""
    batch, args = random_batch(50), cell.args()
    targets = cell.script.model_targets(batch, *cell.flag)
    scaler = {"inputs": (torch.zeros(S + A), torch.ones(S + A))}
    if cell.scaled:
        scaler["targets"] = mbpo.fit_scaler(targets)
        targets = mbpo.normalize(targets, scaler["targets"])
    model = {"learner": {"params": {}}, "elites": torch.tensor([0]), "scaler": scaler}
    ensemble = Says(targets[None], torch.full((1, 50, S + 1), -200.0))
    nets = {"actor": mbpo.mlp(S, 2 * A), "ensemble": ensemble}
    noise, choice = (torch.randn(50, A), torch.randn(50, S + 1)), torch.zeros(50, dtype=torch.long)
    _, next_obs, reward = cell.script.model_step(model, {}, batch.obs, choice, noise, nets, args)
    torch.testing.assert_close(next_obs, batch.next_obs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reward, batch.reward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_constant_reward_does_not_harm_the_fit(cell, reward):
    """A reward that never changes, in float32, leaves scales at 1 and all numbers finite."""
    batch = random_batch(300)._replace(reward=torch.full((300,), reward))
    args = cell.args(ensemble_size=3, num_elites=2)
    net, learner = make_ensemble(3)
    update = partial(mbpo.in_place, mbpo.model_update, net=net, args=args)
    model, metrics = cell.script.fit_ensemble(learner, batch, 20, update, net, args, seeded())
    assert all(x.isfinite().all() for x in flat(model).values())
    assert all(math.isfinite(x) for x in metrics.values())
    if cell.scaled:
        assert model["scaler"]["targets"][1][-1] == 1
    assert metrics["reward_error"] < 10  # in units of the reward itself, as its scale is 1


class Fit:
    """A fit whose updates note the rows that they get, and set made-up weights.

    Actions are distinct numbers, by which rows can be told; all else is zero, so that a member
    that predicts a constant has its square as error.
    """

    def __init__(self, cell, errors: list[list[float]], n: int = 100, **settings):
        self.cell, self.errors, self.given = cell, torch.tensor(errors), []
        members, zero = self.errors.shape[1], torch.zeros(n)
        self.args = cell.args(ensemble_size=members, **({"num_elites": 1} | settings))
        self.net = mbpo.Ensemble(members, 2, 2, 3)
        action = torch.arange(n, dtype=torch.float32)[:, None]
        self.data = mbpo.Batch(zero[:, None], action, zero, zero[:, None], zero)

    def update(self, learner, x, y):
        """The next learner: the errors of a row of the table, and the update's number all over."""
        self.given.append(x)
        number = len(self.given)
        params = {k: torch.full_like(p, float(number)) for k, p in learner["params"].items()}
        params["weights.4"].zero_()
        params["biases.4"][:, 0] = self.errors[min(number, len(self.errors)) - 1].sqrt()[:, None]
        return learner | {"params": params}, torch.tensor(float(number))

    def run(self, updates: int):
        """Fits; returns the model and the metrics, and has `trained`, the rows [U, E, 256]."""
        learner, update = mbpo.adam_init(self.net, CPU), partial(mbpo.in_place, self.update)
        parts = learner, self.data, updates, update, self.net, self.args, seeded()
        model, metrics = self.cell.script.fit_ensemble(*parts)
        mean, std = model["scaler"]["inputs"]
        self.trained = (torch.stack(self.given)[..., 1] * std[1] + mean[1]).round().long()
        return model, metrics


@pytest.mark.parametrize("updates", [1, 3, 7])
def test_fit_takes_so_many_updates_and_keeps_the_last_weights(cell, updates):
    """Neither errors that fall nor errors that rise end it, and no earlier weights come back."""
    fit = Fit(cell, [[1.0, 9.0], [2.0, 0.1], [3.0, 0.2], [4.0, 0.1]])
    model, metrics = fit.run(updates)
    assert metrics["updates"] == metrics["loss"] == len(fit.given) == updates
    assert all(x.shape == (2, 256, 2) for x in fit.given)
    for name in ("weights.0", "biases.0", "max_log_var"):
        assert model["learner"]["params"][name].eq(updates).all()


def test_elites_are_the_members_of_least_holdout_error(cell):
    """They are ordered by the error of their last weights, and holdout_mse is theirs."""
    errors = [[0.1, 0.2, 0.3, 0.4, 0.5], [3.0, 0.5, 2.0, 0.25, 1.0]]
    model, metrics = Fit(cell, errors, num_elites=3).run(2)
    assert model["elites"].tolist() == [3, 1, 4]
    assert metrics["holdout_mse"].item() == pytest.approx((0.25 + 0.5 + 1) / 3)


@pytest.mark.parametrize(
    ("n", "ratio", "size"),
    [(100, 0.2, 20), (103, 0.25, 25), (24_900, 0.2, 4980), (26_000, 0.2, 5000)],
)
def test_holdout_is_a_share_of_at_most_5000_and_never_trained_on(cell, n, ratio, size):
    """All others are met in long training of many members; its errors are the holdout's."""
    fit = Fit(cell, [[1.0] * 24], n, holdout_ratio=ratio)
    fit.data = fit.data._replace(reward=torch.arange(n) / n)  # tells which rows the errors are of
    model, metrics = fit.run(2 + n // 250)
    trained = set(fit.trained.unique().tolist())
    holdout = [i for i in range(n) if i not in trained]
    assert len(holdout) == size
    assert holdout != list(range(size))  # nor simply the first
    assert holdout != list(range(n - size, n))  # or last
    targets = torch.stack([torch.zeros(n), fit.data.reward], 1)
    if cell.scaled:
        targets = mbpo.normalize(targets, model["scaler"]["targets"])
    expected = ((targets[holdout] - 1) ** 2).mean()
    torch.testing.assert_close(metrics["holdout_mse"], expected)


def test_scalers_are_of_the_training_split(cell):
    """Means and deviations are those of the transitions that were not held out."""
    fit = Fit(cell, [[1.0] * 24])
    fit.data = fit.data._replace(reward=torch.rand(100), next_obs=torch.rand(100, 1))
    model, _ = fit.run(4)
    train = fit.trained.unique()
    assert len(train) == 80
    x = torch.cat([fit.data.obs, fit.data.action], 1)[train]
    y = torch.cat([fit.data.next_obs, fit.data.reward[:, None]], 1)[train]  # s is zero
    expected = {"inputs": x, "targets": y} if cell.scaled else {"inputs": x}
    assert model["scaler"].keys() == expected.keys()
    for name, rows in expected.items():
        mean, std = model["scaler"][name]
        torch.testing.assert_close(mean, rows.mean(0))
        deviation = rows.std(0, correction=0)
        torch.testing.assert_close(std, torch.where(deviation == 0, 1.0, deviation))


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


def test_inputs_and_targets_of_an_update_belong_together(cell):
    """Row by row, an update gets the normalized inputs of a transition and its own target."""
    batch, pairs, args = random_batch(200), [], cell.args(ensemble_size=3, num_elites=1)
    net, learner = make_ensemble(3)

    def update(learner, x, y):
        pairs.append((x, y))
        return torch.zeros(())

    model, _ = cell.script.fit_ensemble(learner, batch, 2, update, net, args, seeded())
    scaler = model["scaler"]
    x = mbpo.normalize(torch.cat([batch.obs, batch.action], 1), scaler["inputs"])
    y = cell.script.model_targets(batch, *cell.flag)
    y = mbpo.normalize(y, scaler["targets"]) if cell.scaled else y
    for inputs, targets in pairs:
        index = torch.cdist(inputs.flatten(0, 1), x).argmin(1)
        torch.testing.assert_close(x[index], inputs.flatten(0, 1))
        torch.testing.assert_close(y[index], targets.flatten(0, 1))


def test_fit_with_patience_stops_early(cell):
    """Epochs of 720 rows are three updates; members go back to their best, elites are the best."""
    table = [[4.0, 9.0, 1.0], [5.0, 2.0, 3.0], *[[9.0] * 3] * 3]
    errors = [row for row in table for _ in range(3)]
    fit = Fit(cell, errors, 900, model_patience=2, num_elites=2)
    model, metrics = fit.run(1)
    assert len(fit.given) == 3 * (2 + 3)
    assert model["learner"]["params"]["biases.0"][:, 0, 0].tolist() == [3, 6, 3]
    assert metrics["updates"] == (3 + 6 + 3) / 3
    assert model["elites"].tolist() == [2, 1]
    assert metrics["holdout_mse"].item() == pytest.approx((1 + 2) / 2)


def stop_early(errors: list[list[float]], patience: int, epoch: int = 1) -> tuple:
    """Stops early on holdout errors of a table, one row per epoch, of which the last one stays.

    Returns the parameters, all of which were the number of steps done, and what it returns.
    """
    members, steps = len(errors[0]), []
    params = {"weights.0": torch.zeros(members, 2, 2), "biases.0": torch.zeros(members, 1, 2)}
    params |= {"max_log_var": torch.zeros(2), "min_log_var": torch.zeros(2)}

    def learn():
        steps.append(1)
        assert len(steps) < 1000
        for param in params.values():
            param += 1
        return torch.tensor(len(steps))

    def holdout_error():
        return torch.tensor(errors[min(len(steps) // epoch, len(errors)) - 1])

    return params, *mbpo.stop_early({"params": params}, learn, holdout_error, epoch, patience)


def test_members_go_back_to_their_own_best_weights():
    """Each member's weights are those of its least error; the shared bounds are the last ones."""
    table = [[4.0, 9.0, 1.0, 6.0], [5.0, 2.0, 3.0, 5.0], [8.0, 3.0, 3.0, 4.0], [9.0] * 4]
    params, loss, kept = stop_early(table, patience=2, epoch=5)
    for name in ("weights.0", "biases.0"):
        assert params[name][:, 0, 0].tolist() == [5, 10, 5, 15]
        assert torch.equal(params[name], params[name][:, :1, :1].expand_as(params[name]))
    assert params["max_log_var"].eq(30).all()
    assert params["min_log_var"].eq(30).all()
    assert loss == 30  # three epochs that improve, three that do not
    assert kept == (5 + 10 + 5 + 15) / 4


@pytest.mark.parametrize("patience", [1, 3, 5])
@pytest.mark.parametrize(("second", "best"), [(0.995, 1), (0.991, 1), (0.989, 2)])
def test_learning_stops_when_no_member_improves_by_one_percent(patience, second, best):
    """Patience is exceeded: by the 6th epoch in which no member improves by 1 %, of 5."""
    params, loss, kept = stop_early([[1.0, 1.0], [1.0, second]], patience)
    assert loss == best + patience + 1
    assert params["biases.0"][:, 0, 0].tolist() == [1, best]
    assert kept == (1 + best) / 2


def test_small_improvements_add_up():
    """Errors are compared with the best kept: two times 0.6 % in a row is an improvement."""
    params, loss, _ = stop_early([[0.994**i] for i in range(9)], patience=2)
    assert params["biases.0"][0, 0, 0] == 9  # improved at epochs 1, 3, 5, 7, 9
    assert loss == 9 + 3


def test_improvement_of_one_member_resets_patience():
    """The learning goes on while members improve in turns."""
    table = [[1.0, 1.0], [1.0, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 0.5], [0.5, 0.5]]
    params, loss, _ = stop_early(table, patience=1)
    assert params["biases.0"][:, 0, 0].tolist() == [3, 5]
    assert loss == 5 + 2


def test_errors_that_are_no_numbers_end_the_learning():
    """NaN is no improvement: what was kept before it stays."""
    params, loss, _ = stop_early([[1.0, 1.0], [math.nan, 0.5], [math.nan, math.nan]], patience=2)
    assert params["biases.0"][:, 0, 0].tolist() == [1, 2]
    assert loss == 2 + 3


def test_model_metrics_by_hand():
    """Errors of both kinds, shares and spreads, in loops over elites, transitions, dimensions."""
    n, inflation = 4, torch.rand(S) + 1
    mean, log_var, y = torch.randn(2, n, S + 1), torch.randn(2, n, S + 1), torch.randn(n, S + 1)
    y[:, -1] *= 0.1  # so that the reward's error is the largest of all
    metrics = mbpo.model_metrics(mean, log_var, y, inflation)
    errors, weighted, sigmas, changes = [], [], [], []
    for d in range(S + 1):
        squares = [(mean[k, i, d] - y[i, d]).item() ** 2 for k in range(2) for i in range(n)]
        variances = [math.exp(log_var[k, i, d]) for k in range(2) for i in range(n)]
        spread = variance(y[:, d].tolist())
        errors.append(sum(squares) / (2 * n) / spread)
        weighted.append(sum(s / v for s, v in zip(squares, variances, strict=True)) / (2 * n))
        sigmas.append(sum(math.sqrt(v) for v in variances) / (2 * n) / math.sqrt(spread))
        if d < S:
            sampled = (sum(squares) + sum(variances)) / (2 * n)
            changes.append(sampled / spread * inflation[d].item() ** 2)
    expected = {
        "reward_error": errors[-1],
        "state_error_mean": sum(errors[:-1]) / S,
        "state_error_worst": max(errors[:-1]),
        "change_error_mean": sum(changes) / S,
        "change_error_worst": max(changes),
        "reward_share_of_loss": weighted[-1] / sum(weighted),
        "reward_std_ratio": sigmas[-1],
    }
    assert errors[-1] == max(errors)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_change_error_is_that_of_rollouts(cell):
    """It is E[(s'_e - s')^2] / Var[s' - s] of the s'_e that model_step draws, to 10 %."""
    data, args = learnable_data(25_000), cell.args(ensemble_size=3, num_elites=2)
    net, learner = make_ensemble(3)
    idle = partial(cell.script.fit_ensemble, learner, data, 1, lambda *_: torch.tensor(0.0))
    model, metrics = idle(net, args, seeded())
    sure = torch.cat([torch.atanh(data.action), torch.full_like(data.action, -100.0)], 1)
    nets, n = {"actor": Says(sure), "ensemble": net}, len(data.obs)
    noise, choice = (torch.zeros(n, A), torch.randn(n, S + 1)), torch.randint(2, (n,))
    parts = model, {}, data.obs, choice, noise, nets, args
    action, next_obs, _ = cell.script.model_step(*parts)
    torch.testing.assert_close(action, data.action, rtol=1e-4, atol=1e-4)
    error = ((next_obs - data.next_obs) ** 2).mean(0) / (data.next_obs - data.obs).var(0)
    assert metrics["change_error_mean"].item() == pytest.approx(error.mean().item(), rel=0.1)
    assert metrics["change_error_worst"].item() == pytest.approx(error.max().item(), rel=0.1)
    assert error.max() > 1.2 * error.mean()


def variance(numbers: list[float]) -> float:
    """Mean squared deviation from the mean."""
    mean = sum(numbers) / len(numbers)
    return sum((x - mean) ** 2 for x in numbers) / len(numbers)


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


def test_rollout_horizon_at_its_ends():
    """The paper's schedules: from 1 to 15 between two steps; constant where FROM is TO."""
    horizon = partial(mbpo.rollout_horizon, schedule=(20_000, 100_000, 1, 15))
    steps = (0, 20_000, 25_714, 25_715, 99_999, 100_000, 10**6)
    assert [horizon(step) for step in steps] == [1, 1, 1, 2, 14, 15, 15]
    assert {mbpo.rollout_horizon(step, (0, 1, 1, 1)) for step in steps} == {1}


class Walk:
    """A scripted model: state (branch, steps so far); notes what it is given."""

    def __init__(self, lengths: list[int], elites: int = 3):
        self.lengths, self.calls, self.asked = torch.tensor(lengths), [], []
        self.model = {"elites": torch.arange(elites)}

    def step(self, model, actor, obs, choice, noise):
        """One step on; the action tells the step, the reward the branch and the step."""
        self.calls.append((model, actor, obs, choice, noise))
        next_obs = obs + torch.tensor([0.0, 1.0])
        action = next_obs[:, 1:].expand(-1, 3) / 10
        return action, next_obs, 100 * obs[:, 0] + obs[:, 1]

    def terminates(self, obs, action, next_obs):
        """Branch b ends with its step lengths[b], and would with all later odd ones."""
        self.asked.append((obs, action, next_obs))
        return next_obs[:, 1] == self.lengths[next_obs[:, 0].long()]

    def rollout(self, horizon: int):
        """Rows of a rollout from every branch's start."""
        n = len(self.lengths)
        obs = torch.stack([torch.arange(n), torch.zeros(n)], 1)
        starts = mbpo.Batch(obs, torch.zeros(n, 3), torch.zeros(n), obs + 7, torch.ones(n))
        return mbpo.rollout(
            self.model, "actor", starts, horizon, self.step, self.terminates, seeded()
        )


def test_rollout_branches_stop_where_they_terminate():
    """A branch's rows end with its termination, marked as such; the others go on to the end."""
    walk = Walk([1, 3, 99, 2, 4])
    rows = walk.rollout(4)
    expected = []
    for t in range(4):
        for branch, length in enumerate([1, 3, 99, 2, 4]):
            if t < length:
                action = [(t + 1) / 10] * 3
                end = float(t + 1 == length)
                expected.append([branch, t, *action, 100 * branch + t, branch, t + 1, end])
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float32))


def test_rollout_passes_on_what_the_model_made():
    """Step and termination get the states the last step predicted, and termination the action."""
    walk = Walk([99] * 3)
    walk.rollout(3)
    assert len(walk.calls) == len(walk.asked) == 3
    for t, (call, asked) in enumerate(zip(walk.calls, walk.asked, strict=True)):
        assert call[:2] == (walk.model, "actor")
        for obs in (call[2], asked[0]):
            assert obs.tolist() == [[branch, t] for branch in range(3)]
        assert asked[1].tolist() == [[pytest.approx((t + 1) / 10)] * 3] * 3
        assert asked[2].tolist() == [[branch, t + 1] for branch in range(3)]


def test_every_branch_draws_an_elite_and_noise_at_every_step():
    """Elites are drawn evenly, anew for each branch and step; so is the noise."""
    walk = Walk([99] * 2000)
    walk.rollout(3)
    choices = torch.stack([call[3] for call in walk.calls])
    assert choices.shape == (3, 2000)
    for t in range(3):
        counts = choices[t].bincount(minlength=3)
        assert len(counts) == 3
        assert (counts - 2000 / 3).abs().max() < 110  # five standard deviations
        agree = (choices[t] == choices[t - 1]).float().mean()
        assert abs(agree - 1 / 3) < 0.053  # another draw than at the step before
    for part, width in [(0, 3), (1, 3)]:  # the action's; the model's, of S + 1
        noise = torch.stack([call[4][part] for call in walk.calls])
        assert noise.shape == (3, 2000, width)
        assert noise.unique().numel() > 0.99 * noise.numel()
        assert abs(noise.mean()) < 0.04
        assert abs(noise.std() - 1) < 0.03


def sharp_model(cell):
    """A model of four members with two elites and hardly any noise, and the networks."""
    net = mbpo.Ensemble(4, S + A, S + 1, 8)
    with torch.no_grad():
        for bias in net.biases:
            bias.normal_()
        net.max_log_var.fill_(-80.0)
        net.min_log_var.fill_(-90.0)
    nets = {"actor": mbpo.mlp(S, 2 * A), "ensemble": net}
    scaler = {"inputs": (torch.randn(S + A), torch.rand(S + A) + 0.5)}
    if cell.scaled:
        scaler["targets"] = (torch.randn(S + 1), torch.rand(S + 1) + 2)
    learner = mbpo.adam_init(net, CPU)
    return nets, {"learner": learner, "scaler": scaler, "elites": torch.tensor([3, 1])}


@pytest.mark.parametrize("choice", [[0] * 6, [1] * 6, [0, 1, 1, 0, 0, 1]])
def test_model_step_follows_the_chosen_elite(cell, choice):
    """Without noise, s' and r are what the branch's elite predicts, in the task's units."""
    nets, model = sharp_model(cell)
    actor = mbpo.adam_init(nets["actor"], CPU)["params"]
    obs, noise = torch.randn(6, S), (torch.randn(6, A), torch.randn(6, S + 1))
    parts = model, actor, obs, torch.tensor(choice), noise, nets, cell.args()
    action, next_obs, reward = cell.script.model_step(*parts)
    expected_action = mbpo.sample_action(nets, actor, obs, noise[0])[0]
    torch.testing.assert_close(action, expected_action)
    mean, std = model["scaler"]["inputs"]
    for b, elite in enumerate(choice):
        x = (torch.cat([obs[b], action[b]]) - mean) / std
        y = member_output(nets["ensemble"], [3, 1][elite], x[None])[0][0]
        if cell.scaled:
            y = model["scaler"]["targets"][0] + model["scaler"]["targets"][1] * y
        expected = obs[b] + y[:-1] if cell.residual else y[:-1]
        torch.testing.assert_close(next_obs[b], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward[b], y[-1], rtol=1e-4, atol=1e-5)


def test_model_step_adds_noise_of_the_predicted_spread(cell):
    """Noise moves r by its standard deviation, s' by its own, and in the task's units."""
    nets, model = sharp_model(cell)
    params = model["learner"]["params"]
    params["max_log_var"].fill_(-1.0)
    params["min_log_var"].fill_(-1.0 - 1e-6)  # so close that sigma is known but for 2 log 2
    actor = mbpo.adam_init(nets["actor"], CPU)["params"]
    obs, zero, one = torch.randn(6, S), torch.zeros(6, A), torch.ones(6, S + 1)
    choice = torch.zeros(6, dtype=torch.long)
    step = partial(cell.script.model_step, model, actor, obs, choice, nets=nets, args=cell.args())
    _, calm, calm_reward = step(noise=(zero, 0 * one))
    _, moved, moved_reward = step(noise=(zero, one))
    mean, std = model["scaler"]["inputs"]
    inputs = (torch.cat([obs, mbpo.sample_action(nets, actor, obs, zero)[0]], 1) - mean) / std
    log_var = functional_call(nets["ensemble"], params, (inputs,))[1][3]
    sigma = log_var.exp().sqrt()
    if cell.scaled:
        sigma = sigma * model["scaler"]["targets"][1]
    torch.testing.assert_close(moved - calm, sigma[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved_reward - calm_reward, sigma[:, -1], rtol=1e-3, atol=1e-4)


def learnable_data(n: int):
    """Transitions of a simple task with small, nonlinear steps."""
    obs, action = torch.randn(n, S), torch.rand(n, A) * 2 - 1
    next_obs = obs + 0.3 * torch.tanh(obs.roll(1, -1)) + 0.3 * action.sum(-1, keepdim=True)
    reward = torch.tanh(obs[:, 0]) + action[:, 0]
    return mbpo.Batch(obs, action, reward, next_obs, torch.zeros(n))


def test_ensemble_learns_a_simple_task(cell):
    """Within 150 updates nine tenths of the variance are explained, and rollouts are close."""
    data = learnable_data(2000)
    args = cell.args(ensemble_size=3, num_elites=2, model_lr=3e-3, never_terminates=True)
    net = mbpo.Ensemble(3, S + A, S + 1, 64)
    update = partial(mbpo.in_place, mbpo.model_update, net=net, args=args)
    learner = mbpo.adam_init(net, CPU)
    model, metrics = cell.script.fit_ensemble(learner, data, 150, update, net, args, seeded())
    assert metrics["state_error_worst"] < 0.1
    assert metrics["reward_error"] < 0.1
    nets = {"actor": mbpo.mlp(S, 2 * A), "ensemble": net}
    actor = mbpo.adam_init(nets["actor"], CPU)["params"]
    starts = mbpo.Batch(*[x[:200] for x in data])
    step = partial(cell.script.model_step, nets=nets, args=args)
    never = mbpo.termination_function(args)
    rows = mbpo.rollout(model, actor, starts, 2, step, never, seeded())
    made = mbpo.ReplayBuffer(1, S, A, CPU).unpack(rows)
    assert len(rows) == 400
    assert made.action.abs().max() <= 1
    assert made.action.std() > 0.1
    assert torch.equal(made.obs[:200], starts.obs)
    assert torch.equal(made.obs[200:], made.next_obs[:200])
    true = made.obs + 0.3 * torch.tanh(made.obs.roll(1, -1))
    true = true + 0.3 * made.action.sum(-1, keepdim=True)
    assert (made.next_obs - true)[:200].square().mean() < 0.1
    assert not made.terminated.any()
