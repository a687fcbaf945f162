"""The ensemble, its loss, its fit and its rollouts against direct formulas."""

import copy
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from helpers_model import (
    CPU,
    WITH_MODEL,
    A,
    S,
    assert_close,
    flat,
    name_of,
    random_batch,
    seeded,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

import mbpo
import mbpo_ftfl

quick = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture(params=WITH_MODEL, ids=name_of)
def script(request):
    """Each of the three scripts that learn a model."""
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


def make_ensemble(script, members: int = 4, hidden: int = 8):
    """An ensemble with biases and bounds away from their start, and its learner."""
    net = script.Ensemble(members, S + A, S + 1, hidden)
    with torch.no_grad():
        for bias in net.biases:
            bias.normal_()
        net.max_log_var.uniform_(0, 1)
        net.min_log_var.uniform_(-5, -3)
    return net, script.adam_init(net, CPU)


def test_ensemble_starts_from_a_truncated_normal(script):
    """Weights are within two of J's standard deviations 1 / (2 sqrt(fan in)); biases are zero."""
    net = script.Ensemble(7, 11, 4, 200)
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


def test_every_member_is_a_network_of_its_own(script):
    """Members compute four SiLU layers and a linear one, each with its own weights and inputs."""
    net, _ = make_ensemble(script)
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


def test_log_variance_is_softly_clamped(script):
    """Log variances follow the formula inside, and stay at the bounds far outside."""
    net = script.Ensemble(1, 2, 7, 4)
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


def test_every_member_may_get_the_same_inputs(script):
    """Outputs of all members at the same inputs, also of a choice of members."""
    net, learner = make_ensemble(script)
    x = torch.randn(6, S + A)
    chosen = script.members(learner["params"], torch.tensor([2, 0]))
    for params, order in [(learner["params"], range(4)), (chosen, (2, 0))]:
        mean, log_var = functional_call(net, params, (x,))
        for i, e in enumerate(order):
            torch.testing.assert_close(mean[i], member_output(net, e, x)[0])
            torch.testing.assert_close(log_var[i], member_output(net, e, x)[1])


def loss_by_hand(net, x, y):
    """The ensemble's loss with its decay and bounds, member by member and layer by layer."""
    total = 0.01 * sum(net.max_log_var) - 0.01 * sum(net.min_log_var)
    for e in range(len(x)):
        mean, log_var = member_output(net, e, x[e])
        terms = (y[e] - mean) ** 2 / torch.exp(log_var) + log_var
        total = total + terms.sum() / terms.numel()
    for rate, weight in zip((2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), net.weights, strict=True):
        for member in weight:
            total = total + rate * (member**2).sum() / 2
    return total


@pytest.mark.usefixtures("double")
def test_model_update_is_that_of_an_eager_reference(script):
    """Thirty updates give the losses and parameters of a plain loop with torch's Adam."""
    net, learner = make_ensemble(script)
    reference, args = copy.deepcopy(net), script.Args(model_lr=3e-3)
    optimizer = torch.optim.Adam(reference.parameters(), args.model_lr)
    for _ in range(30):
        x, y = torch.randn(4, 10, S + A), torch.randn(4, 10, S + 1)
        learner, loss = script.model_update(learner, x, y, net, args)
        expected = loss_by_hand(reference, x, y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-8)
    parameters = {name: p.data for name, p in reference.named_parameters()}
    assert_close(learner["params"], parameters, rtol=1e-6, atol=1e-7)


def test_model_update_changes_nothing_it_is_given(script):
    """The learner that goes in keeps its tensors; all of those that come out are new."""
    net, learner = make_ensemble(script)
    before, x, y = copy.deepcopy(learner), torch.randn(4, 9, S + A), torch.randn(4, 9, S + 1)
    new, _ = script.model_update(learner, x, y, net, script.Args())
    assert_close(learner, before, rtol=0, atol=0)
    assert not any(torch.equal(x, flat(new)[path]) for path, x in flat(learner).items())


def test_normalized_rows_have_unit_scale(script):
    """Every dimension gets mean 0 and standard deviation 1, whatever its units."""
    x = torch.randn(500, 4) * torch.tensor([1e-4, 1.0, 7.0, 1e4]) + torch.tensor([0, 3.0, -5, 9])
    unit = script.normalize(x, script.fit_scaler(x)).double()
    torch.testing.assert_close(unit.mean(0), torch.zeros(4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(unit.square().mean(0), torch.ones(4).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.3, 7.7, -1234.5, 1e-9])
@pytest.mark.parametrize("n", [3, 300, 4001])
def test_constant_dimension_has_scale_one(script, constant, n):
    """A dimension that never changes is shifted and left at its scale, despite rounding."""
    x = torch.stack([torch.full((n,), constant), torch.randn(n)], 1)
    assert script.fit_scaler(x)[1][1] != 1
    for rows in (x, x[:, :1].clone()):  # torch rounds sums of one column otherwise than of two
        mean, std = script.fit_scaler(rows)
        assert std[0] == 1
        torch.testing.assert_close(mean[0], torch.tensor(constant), rtol=1e-5, atol=1e-8)
        assert script.normalize(rows, (mean, std))[:, 0].abs().max() <= 1e-5 * abs(constant)


def residual_flags(script) -> list[tuple]:
    """What the script's target functions take after the data."""
    return [(True,), (False,)] if script not in (mbpo, mbpo_ftfl) else [()]


def test_prediction_undoes_targets(script):
    """Targets at unit scale, brought back and applied to s, are s' and r again."""
    batch = random_batch(script, 50)
    for flags in residual_flags(script):
        targets = script.model_targets(batch, *flags)
        mean, std = scaler = script.fit_scaler(targets)
        prediction = mean + std * script.normalize(targets, scaler)
        next_obs, reward = script.apply_prediction(batch.obs, prediction, *flags)
        torch.testing.assert_close(next_obs, batch.next_obs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reward, batch.reward, rtol=1e-5, atol=1e-5)


def test_mbpo_learns_differences_and_ftfl_learns_next_states():
    """MBPO's targets are s' - s and r; FTFL's are s' and r."""
    batch = random_batch(mbpo, 6)
    reward = batch.reward[:, None]
    difference = torch.cat([batch.next_obs - batch.obs, reward], 1)
    assert torch.equal(mbpo.model_targets(batch), difference)
    assert torch.equal(mbpo_ftfl.model_targets(batch), torch.cat([batch.next_obs, reward], 1))


@pytest.mark.parametrize("reward", [0.0, 0.3])
def test_constant_reward_does_not_harm_the_fit(script, reward):
    """A reward that never changes, in float32, leaves scales at 1 and all numbers finite."""
    batch = random_batch(script, 300)._replace(reward=torch.full((300,), reward))
    args = script.Args(ensemble_size=3, num_elites=2, model_max_updates=20)
    net, learner = make_ensemble(script, 3)
    update = partial(script.in_place, script.model_update, net=net, args=args)
    model, metrics = script.fit_ensemble(learner, batch, update, net, args, seeded())
    assert all(x.isfinite().all() for x in flat(model).values())
    assert all(math.isfinite(x) for x in metrics.values())
    if "targets" in model["scaler"]:
        assert model["scaler"]["targets"][1][-1] == 1
    assert metrics["reward_error"] < 10  # in units of the reward itself, as its scale is 1


class ScriptedFits:
    """An `update` whose members have the holdout errors of a table, one row per epoch.

    The data are all zeros but for the actions, so that a member's squared bias is its error.
    Actions are distinct numbers: the rows that a member was given can be told by them.
    """

    def __init__(self, script, table, n=100, per_epoch=1, **settings):
        self.script, self.table, self.per_epoch = script, torch.tensor(table), per_epoch
        members = self.table.shape[1]
        self.args = script.Args(ensemble_size=members, **settings)
        self.net = script.Ensemble(members, 2, 2, 3)
        self.learner, self.given, self.tested = script.adam_init(self.net, CPU), [], []
        self.data = script.Batch(
            torch.zeros(n, 1),
            torch.arange(n, dtype=torch.float32)[:, None],
            torch.zeros(n),
            torch.zeros(n, 1),
            torch.zeros(n),
        )

    def update(self, learner, x, y):
        """The next learner: zero weights, biases that make the errors, and tags of the epoch."""
        self.given.append(x)
        epoch = min((len(self.given) - 1) // self.per_epoch, len(self.table) - 1)
        params = {name: torch.zeros_like(p) for name, p in learner["params"].items()}
        params["biases.4"][:, 0, :2] = self.table[epoch].sqrt()[:, None]
        tag = float(len(self.given))
        params["biases.0"] += tag
        params["max_log_var"] += tag
        return learner | {"params": params, "t": torch.tensor(tag)}, torch.tensor(tag)

    def fit(self, monkeypatch, seed: int = 0):
        """Fits, and notes the rows that were held out."""

        def spy(net, params, inputs):
            self.tested.append(*inputs)
            return functional_call(net, params, inputs)

        monkeypatch.setattr(self.script, "functional_call", spy)
        model, metrics = self.script.fit_ensemble(
            self.learner,
            self.data,
            partial(self.script.in_place, self.update),
            self.net,
            self.args,
            seeded(seed),
        )
        self.inputs = model["scaler"]["inputs"]
        self.holdout = self.numbers(self.tested.pop())  # for the metrics, in one
        return model, metrics

    def numbers(self, x):
        """Which transitions the rows x are."""
        mean, std = self.inputs
        return (x[..., 1] * std[1] + mean[1]).round().long()


def test_members_go_back_to_their_own_best_weights(script, monkeypatch):
    """Each member's weights are those of its least error; the shared bounds are the last ones."""
    table = [[4.0, 9.0, 1.0, 6.0], [5.0, 2.0, 3.0, 5.0], [8.0, 3.0, 3.0, 4.0], [9.0] * 4]
    fits = ScriptedFits(script, table, model_patience=2, num_elites=3)
    model, metrics = fits.fit(monkeypatch)
    params = model["learner"]["params"]
    assert params["biases.0"][:, 0, 0].tolist() == [1, 2, 1, 3]
    errors = params["biases.4"][:, 0, 0] ** 2
    torch.testing.assert_close(errors, torch.tensor([4.0, 2.0, 1.0, 4.0]))
    assert params["max_log_var"].eq(5).all()
    assert model["learner"]["t"] == 5
    assert metrics["updates"] == 5  # three epochs that improve, two that do not


def test_elites_are_the_members_of_least_holdout_error(script, monkeypatch):
    """The elites are ordered by their best error, not by their last, and give holdout_mse."""
    table = [[3.0, 0.5, 2.0, 5.0, 1.0], [3.0, 7.0, 2.0, 0.25, 8.0]]
    model, metrics = ScriptedFits(script, table, num_elites=3).fit(monkeypatch)
    assert model["elites"].tolist() == [3, 1, 4]
    assert metrics["holdout_mse"].item() == pytest.approx((0.25 + 0.5 + 1) / 3)


@pytest.mark.parametrize("patience", [1, 3, 5])
@pytest.mark.parametrize(("second", "epochs"), [(0.995, 1), (0.991, 1), (0.989, 2)])
def test_fit_stops_when_no_member_improves_by_one_percent(
    script, monkeypatch, patience, second, epochs
):
    """Patience counts epochs in which every member improves by less than 1 %."""
    table = [[1.0, 1.0], [1.0, second]]
    fits = ScriptedFits(script, table, model_patience=patience, num_elites=1)
    model, metrics = fits.fit(monkeypatch)
    assert metrics["updates"] == epochs + patience
    assert model["learner"]["params"]["biases.0"][1, 0, 0] == epochs


def test_small_improvements_add_up(script, monkeypatch):
    """Errors are compared with the best kept: two times 0.6 % in a row is an improvement."""
    errors = [[0.994**i] for i in range(9)]
    fits = ScriptedFits(script, errors, model_patience=2, num_elites=1)
    _, metrics = fits.fit(monkeypatch)
    assert metrics["updates"] == 9 + 2  # improved at epochs 1, 3, 5, 7, 9


def test_improvement_of_one_member_resets_patience(script, monkeypatch):
    """The fit goes on while members improve in turns."""
    table = [[1.0, 1.0], [1.0, 1.0], [0.5, 1.0], [0.5, 1.0], [0.5, 0.5], [0.5, 0.5]]
    _, metrics = ScriptedFits(script, table, model_patience=2, num_elites=1).fit(monkeypatch)
    assert metrics["updates"] == 5 + 2


@pytest.mark.parametrize("most", [1, 3, 4, 7])
def test_model_max_updates_ends_the_fit(script, monkeypatch, most):
    """The fit ends after exactly so many updates, within an epoch too, with its errors known."""
    table = [[0.5**i] * 2 for i in range(10)]  # would go on for ten epochs of three updates
    fits = ScriptedFits(script, table, 900, 3, model_max_updates=most, num_elites=1)
    model, metrics = fits.fit(monkeypatch)
    assert metrics["updates"] == len(fits.given) == most
    assert model["learner"]["params"]["biases.0"][0, 0, 0] == most


def test_fit_without_a_cap_goes_over_the_data_in_batches_of_256(script, monkeypatch):
    """An epoch of 720 transitions is three updates; the last batch is filled up."""
    fits = ScriptedFits(script, [[1.0, 1.0]], 900, 3, model_patience=2, num_elites=1)
    _, metrics = fits.fit(monkeypatch)
    assert metrics["updates"] == 3 * 3
    assert all(x.shape == (2, 256, 2) for x in fits.given)


@pytest.mark.parametrize(
    ("n", "ratio", "size"),
    [(100, 0.2, 20), (103, 0.25, 25), (24_900, 0.2, 4980), (26_000, 0.2, 5000)],
)
def test_holdout_is_a_share_of_at_most_5000_and_apart_from_training(
    script, monkeypatch, n, ratio, size
):
    """Held-out transitions are never trained on, and there are as many as asked for."""
    most = {"model_max_updates": 1 + 3 * (n // 256), "model_patience": 9}
    per_epoch = -(-(n - size) // 256)
    fits = ScriptedFits(
        script, [[1.0] * 3], n, per_epoch, holdout_ratio=ratio, num_elites=1, **most
    )
    _, metrics = fits.fit(monkeypatch)
    held_out = set(fits.holdout.tolist())
    trained = {i for x in fits.given for i in fits.numbers(x).flatten().tolist()}
    assert len(fits.holdout) == len(held_out) == size
    assert not held_out & trained
    assert held_out != set(range(size))  # nor simply the first
    assert held_out != set(range(n - size, n))  # or last
    tested = torch.cat([fits.numbers(x) for x in fits.tested]).view(-1, size)
    assert (tested == fits.holdout).all()  # epoch by epoch, in parts
    assert metrics["holdout_mse"].item() == pytest.approx(1.0)


def test_scalers_are_of_the_training_split(script, monkeypatch):
    """Means and deviations are those of the transitions that were not held out."""
    fits = ScriptedFits(script, [[1.0] * 3], num_elites=1)
    fits.data = fits.data._replace(reward=torch.rand(100), next_obs=torch.rand(100, 1))
    model, _ = fits.fit(monkeypatch)
    train = [i for i in range(100) if i not in set(fits.holdout.tolist())]
    x = torch.cat([fits.data.obs, fits.data.action], 1)[train]
    y = torch.cat([fits.data.next_obs - fits.data.obs, fits.data.reward[:, None]], 1)[train]
    expected = {"inputs": x} if script is mbpo else {"inputs": x, "targets": y}
    assert model["scaler"].keys() == expected.keys()
    for name, rows in expected.items():
        mean, std = model["scaler"][name]
        torch.testing.assert_close(mean, rows.mean(0))
        deviation = rows.std(0, correction=0)
        torch.testing.assert_close(std, torch.where(deviation == 0, 1.0, deviation))


def test_every_member_has_a_bootstrap_sample_of_its_own(script, monkeypatch):
    """A member sees the same sample every epoch, in another order; members' samples differ."""
    fits = ScriptedFits(script, [[1.0] * 3], 320, model_patience=3, num_elites=1)
    fits.fit(monkeypatch)  # 256 train, which is one batch
    epochs = [fits.numbers(x) for x in fits.given]
    assert len(epochs) == 4
    for epoch in epochs[1:]:
        assert torch.equal(epoch.sort(1).values, epochs[0].sort(1).values)
        assert not (epoch == epochs[0]).all(1).any()
    samples = [row.tolist() for row in epochs[0].sort(1).values]
    for i, sample in enumerate(samples):
        assert 130 < len(set(sample)) < 195  # 63 % of the rows, as with replacement
        assert samples[i - 1] != sample


def test_inputs_and_targets_of_an_update_belong_together(script):
    """Row by row, an update gets the normalized inputs of a transition and its own target."""
    batch = random_batch(script, 200)
    pairs, args = [], script.Args(ensemble_size=3, num_elites=1, model_max_updates=2)
    net, learner = make_ensemble(script, 3)

    def update(learner, x, y):
        pairs.append((x, y))
        return torch.zeros(())

    model, _ = script.fit_ensemble(learner, batch, update, net, args, seeded())
    scaler, flags = model["scaler"], residual_flags(script)[0]
    x = script.normalize(torch.cat([batch.obs, batch.action], 1), scaler["inputs"])
    y = script.model_targets(batch, *flags)
    y = script.normalize(y, scaler["targets"]) if "targets" in scaler else y
    for inputs, targets in pairs:
        index = torch.cdist(inputs.flatten(0, 1), x).argmin(1)
        torch.testing.assert_close(x[index], inputs.flatten(0, 1))
        torch.testing.assert_close(y[index], targets.flatten(0, 1))


def test_model_metrics_by_hand(script):
    """Errors, the reward's share of the loss and its predicted spread, in loops over the elites."""
    net, learner = make_ensemble(script)
    model = {"learner": learner, "elites": torch.tensor([2, 0])}
    x, y, n = torch.randn(4, S + A), torch.randn(4, S + 1), 4
    y[:, -1] *= 0.1  # so that the reward's error is the largest of all
    metrics = script.model_metrics(model, net, x, y)
    with torch.no_grad():
        outputs = [member_output(net, e, x) for e in (2, 0)]
    errors, weighted, sigmas = [], [], []
    for d in range(S + 1):
        column = y[:, d].tolist()
        variance = sum((v - sum(column) / n) ** 2 for v in column) / n
        squares = [(mean[i, d] - y[i, d]).item() ** 2 for mean, _ in outputs for i in range(n)]
        variances = [math.exp(log_var[i, d]) for _, log_var in outputs for i in range(n)]
        errors.append(sum(squares) / (2 * n) / variance)
        weighted.append(sum(s / v for s, v in zip(squares, variances, strict=True)) / (2 * n))
        sigmas.append(sum(math.sqrt(v) for v in variances) / (2 * n) / math.sqrt(variance))
    expected = {
        "reward_error": errors[-1],
        "state_error_mean": sum(errors[:-1]) / S,
        "state_error_worst": max(errors[:-1]),
        "reward_share_of_loss": weighted[-1] / sum(weighted),
        "reward_std_ratio": sigmas[-1],
    }
    assert errors[-1] == max(errors)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4)


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
    for script in WITH_MODEL:
        assert script.rollout_horizon(step, (start, start + length, low, high)) == expected


def test_rollout_horizon_at_its_ends(script):
    """The paper's schedules: from 1 to 15 between two steps; constant where START is END."""
    horizon = partial(script.rollout_horizon, schedule=(20_000, 100_000, 1, 15))
    steps = (0, 20_000, 25_714, 25_715, 99_999, 100_000, 10**6)
    assert [horizon(step) for step in steps] == [1, 1, 1, 2, 14, 15, 15]
    assert {script.rollout_horizon(step, (0, 1, 1, 1)) for step in steps} == {1}
    assert {script.rollout_horizon(step, (7, 7, 4, 4)) for step in steps} == {4}


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

    def rollout(self, script, horizon: int):
        """Rows of a rollout from every branch's start."""
        n = len(self.lengths)
        obs = torch.stack([torch.arange(n), torch.zeros(n)], 1)
        starts = script.Batch(obs, torch.zeros(n, 3), torch.zeros(n), obs + 7, torch.ones(n))
        return script.rollout(
            self.model, "actor", starts, horizon, self.step, self.terminates, seeded()
        )


def test_rollout_branches_stop_where_they_terminate(script):
    """A branch's rows end with its termination, marked as such; the others go on to the end."""
    walk = Walk([1, 3, 99, 2, 4])
    rows = walk.rollout(script, 4)
    expected = []
    for t in range(4):
        for branch, length in enumerate([1, 3, 99, 2, 4]):
            if t < length:
                action = [(t + 1) / 10] * 3
                end = float(t + 1 == length)
                expected.append([branch, t, *action, 100 * branch + t, branch, t + 1, end])
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float32))


def test_rollout_passes_on_what_the_model_made(script):
    """Step and termination get the states the last step predicted, and termination the action."""
    walk = Walk([99] * 3)
    walk.rollout(script, 3)
    assert len(walk.calls) == len(walk.asked) == 3
    for t, (call, asked) in enumerate(zip(walk.calls, walk.asked, strict=True)):
        assert call[:2] == (walk.model, "actor")
        for obs in (call[2], asked[0]):
            assert obs.tolist() == [[branch, t] for branch in range(3)]
        assert asked[1].tolist() == [[pytest.approx((t + 1) / 10)] * 3] * 3
        assert asked[2].tolist() == [[branch, t + 1] for branch in range(3)]


def test_every_branch_draws_an_elite_and_noise_at_every_step(script):
    """Elites are drawn evenly, anew for each branch and step; so is the noise."""
    walk = Walk([99] * 2000)
    walk.rollout(script, 3)
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


def sharp_model(script, normalized: bool):
    """A model of four members with two elites and hardly any noise, and the networks."""
    net = script.Ensemble(4, S + A, S + 1, 8)
    with torch.no_grad():
        for bias in net.biases:
            bias.normal_()
        net.max_log_var.fill_(-80.0)
        net.min_log_var.fill_(-90.0)
    nets = {"actor": script.mlp(S, 2 * A), "ensemble": net}
    scaler = {"inputs": (torch.randn(S + A), torch.rand(S + A) + 0.5)}
    if normalized:
        scaler["targets"] = (torch.randn(S + 1), torch.rand(S + 1) + 2)
    learner = script.adam_init(net, CPU)
    return nets, {"learner": learner, "scaler": scaler, "elites": torch.tensor([3, 1])}


@pytest.mark.parametrize("choice", [[0] * 6, [1] * 6, [0, 1, 1, 0, 0, 1]])
def test_model_step_follows_the_chosen_elite(script, choice):
    """Without noise, s' and r are what the branch's elite predicts, in the task's units."""
    args = script.Args()
    normalized = getattr(args, "normalize_targets", script is mbpo_ftfl)
    residual = getattr(args, "predict_residual", script is mbpo)
    nets, model = sharp_model(script, normalized)
    actor = script.adam_init(nets["actor"], CPU)["params"]
    obs, noise = torch.randn(6, S), (torch.randn(6, A), torch.randn(6, S + 1))
    action, next_obs, reward = script.model_step(
        model, actor, obs, torch.tensor(choice), noise, nets, args
    )
    expected_action = script.sample_action(nets, actor, obs, noise[0])[0]
    torch.testing.assert_close(action, expected_action)
    mean, std = model["scaler"]["inputs"]
    for b, elite in enumerate(choice):
        x = (torch.cat([obs[b], action[b]]) - mean) / std
        y = member_output(nets["ensemble"], [3, 1][elite], x[None])[0][0]
        if normalized:
            y = model["scaler"]["targets"][0] + model["scaler"]["targets"][1] * y
        expected = obs[b] + y[:-1] if residual else y[:-1]
        torch.testing.assert_close(next_obs[b], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(reward[b], y[-1], rtol=1e-4, atol=1e-5)


def test_model_step_adds_noise_of_the_predicted_spread(script):
    """Noise moves r by its standard deviation, s' by its own, and in the task's units."""
    args = script.Args()
    nets, model = sharp_model(script, getattr(args, "normalize_targets", script is mbpo_ftfl))
    params = model["learner"]["params"]
    params["max_log_var"].fill_(-1.0)
    params["min_log_var"].fill_(-1.0 - 1e-6)  # so close that sigma is known but for 2 log 2
    actor = script.adam_init(nets["actor"], CPU)["params"]
    obs, zero, one = torch.randn(6, S), torch.zeros(6, A), torch.ones(6, S + 1)
    step = partial(script.model_step, model, actor, obs, torch.zeros(6, dtype=torch.long))
    _, calm, calm_reward = step(noise=(zero, 0 * one), nets=nets, args=args)
    _, moved, moved_reward = step(noise=(zero, one), nets=nets, args=args)
    mean, std = model["scaler"]["inputs"]
    inputs = (torch.cat([obs, script.sample_action(nets, actor, obs, zero)[0]], 1) - mean) / std
    log_var = functional_call(nets["ensemble"], params, (inputs,))[1][3]
    sigma = log_var.exp().sqrt()
    if "targets" in model["scaler"]:
        sigma = sigma * model["scaler"]["targets"][1]
    torch.testing.assert_close(moved - calm, sigma[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved_reward - calm_reward, sigma[:, -1], rtol=1e-3, atol=1e-4)


def learnable_data(script, n: int):
    """Transitions of a simple task with small, nonlinear steps."""
    obs, action = torch.randn(n, S), torch.rand(n, A) * 2 - 1
    next_obs = obs + 0.3 * torch.tanh(obs.roll(1, -1)) + 0.3 * action.sum(-1, keepdim=True)
    reward = torch.tanh(obs[:, 0]) + action[:, 0]
    return script.Batch(obs, action, reward, next_obs, torch.zeros(n))


def test_ensemble_learns_a_simple_task(script):
    """Within 400 updates nine tenths of the variance are explained, and rollouts are close."""
    data = learnable_data(script, 2000)
    args = script.Args(ensemble_size=3, num_elites=2, model_max_updates=400)
    net = script.Ensemble(3, S + A, S + 1, 64)
    update = partial(script.in_place, script.model_update, net=net, args=args)
    learner = script.adam_init(net, CPU)
    model, metrics = script.fit_ensemble(learner, data, update, net, args, seeded())
    assert metrics["state_error_worst"] < 0.1
    assert metrics["reward_error"] < 0.1
    nets = {"actor": script.mlp(S, 2 * A), "ensemble": net}
    actor = script.adam_init(nets["actor"], CPU)["params"]
    starts = script.Batch(*[x[:200] for x in data])
    step = partial(script.model_step, nets=nets, args=args)
    never = script.termination_function(script.Args(never_terminates=True))
    rows = script.rollout(model, actor, starts, 2, step, never, seeded())
    made = script.ReplayBuffer(1, S, A, CPU).unpack(rows)
    assert len(rows) == 400
    assert made.action.abs().max() <= 1
    assert made.action.std() > 0.1
    assert torch.equal(made.obs[:200], starts.obs)
    assert torch.equal(made.obs[200:], made.next_obs[:200])
    true = made.obs + 0.3 * torch.tanh(made.obs.roll(1, -1))
    true = true + 0.3 * made.action.sum(-1, keepdim=True)
    assert (made.next_obs - true)[:200].square().mean() < 0.1
    assert not made.terminated.any()
