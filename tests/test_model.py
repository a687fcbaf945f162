"""The ensemble, its loss, its fit and its rollouts against direct formulas."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from helpers_model import CPU, A, S, assert_close, assert_equal, random_batch, seeded
from helpers_run import Outcome, small
from torch import nn
from torch.utils._pytree import tree_leaves

import mbpo
import mbpo_ftfl
import mbpo_residual_ablation


class Cell(NamedTuple):
    """A script, its options, and whether it has targets at unit scale and predicts s' - s."""

    script: object
    options: dict
    scaled: bool
    residual: bool


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


def make_ensemble() -> dict:
    """Four members' parameters, with biases and bounds away from their start."""
    params = mbpo.init_ensemble(4, S + A, S + 1, 8)
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
    """Weights are within two of MBPO's deviations 1 / (2 sqrt(fan in)); biases are zero."""
    params = mbpo.init_ensemble(7, 11, 4, 200)
    sizes = [(11, 200), (200, 200), (200, 200), (200, 200), (200, 8)]
    for (weight, bias), (n, m) in zip(params["layers"], sizes, strict=True):
        assert (weight.shape, bias.shape) == ((7, n, m), (7, 1, m))
        unit = weight * 2 * math.sqrt(n)
        assert 1.95 < unit.abs().max() <= 2.0001
        assert abs(unit.std() - 0.8796) < 0.02  # of a normal cut off at two deviations
        assert not torch.equal(weight[0], weight[1])
        assert not bias.any()
    assert params["max_log_var"].tolist() == [0.5] * 4
    assert params["min_log_var"].tolist() == [-10.0] * 4


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
        assert_close(loss, expected.detach(), rtol=1e-8, atol=1e-8)
    expected = [x.detach() for x in leaves]
    assert_close(tree_leaves(learner["params"]), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "scale"),  # of a dimension that hardly varies: the magnitude
    [
        ([1.0, 2.0, 6.0], math.sqrt(14 / 3)),
        *[([constant] * n, abs(constant)) for constant in (0.3, -1234.5, 1e-9) for n in (3, 4001)],
        ([0.0] * 300, 1),
        ([-50.0, -50.0 + 100 * 0.9e-3], 50),
        ([-50.0, -50.0 + 100 * 1.1e-3], 50 * 1.1e-3),
    ],
)
def test_scale_is_the_deviation_or_the_magnitude(values, scale):
    """The population's deviation; of a constant its size, despite rounding, and of zeros 1."""
    x = torch.tensor(values)
    for rows in (x[:, None], torch.stack([x, x.flip(0)], 1)):  # torch adds these up otherwise
        mean, std = mbpo.fit_scaler(rows)
        assert std[0].item() == pytest.approx(scale, rel=1e-3)
        assert mean[0].item() == pytest.approx(x.double().mean().item(), rel=1e-5)
        assert_close(mbpo.normalize(rows, (mean, std))[:, 0], (x - mean[0]) / std[0])


def test_prediction_is_that_of_each_elite_in_the_tasks_units(cell):
    """Mean and deviation of s' and r, elite by elite: unscaled, and added to s where learned so."""
    model, batch = make_model(cell), random_batch(6)
    params, (m, d) = model["learner"]["params"], model["inputs"]
    args = cell.script.Args(**cell.options)
    actual = cell.script.predict(model, batch.obs, batch.action, args)
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


def test_model_step_samples_from_the_chosen_elite():
    """The action is the policy's; s' and r are mean plus deviation times noise, of one elite."""
    model, actor, choice = make_model(CELLS["mbpo"]), mbpo.init_actor(S, A), [0, 1, 1, 0, 0, 1]
    obs, noise = torch.randn(6, S), (torch.randn(6, A), torch.randn(6, S + 1))
    parts = model, actor, obs, torch.tensor(choice), noise, mbpo.Args()
    action, next_obs, reward = mbpo.model_step(*parts)
    assert_close(action, mbpo.sample_action(actor, obs, noise[0])[0])
    mean, std = mbpo.predict(model, obs, action, mbpo.Args())
    for b, k in enumerate(choice):
        expected = mean[k, b] + std[k, b] * noise[1][b]
        assert_close(torch.cat([next_obs[b], reward[b][None]]), expected)


def test_errors_on_new_by_hand():
    """Errors over elites and new transitions, in units of the variance over all transitions."""
    model, new, data = make_model(CELLS["mbpo"]), random_batch(4), random_batch(9)
    mean, std = mbpo.predict(model, new.obs, new.action, mbpo.Args())
    squares = (mean[..., :S] - new.next_obs) ** 2 + std[..., :S] ** 2  # of samples, expected
    changes, variance = data.next_obs - data.obs, data.reward.var(correction=0)
    expected = {
        "new_reward_error": ((mean[..., -1] - new.reward) ** 2).mean() / variance,
        "new_change_error": (squares / changes.var(0, correction=0)).mean(),
        "new_reward_std_ratio": std[..., -1].mean() / variance.sqrt(),
    }
    assert_close(mbpo.errors_on_new(model, new, data, mbpo.Args()), expected)


def test_errors_on_new_are_of_transitions_not_fitted_yet(tmp_path, monkeypatch):
    """In a run, before each later fit, they are of all transitions since the last, and no other."""
    asked = []

    def errors(model, new, data, args):
        asked.append((new.obs, data.obs, int(model["learner"]["t"])))
        return {}

    monkeypatch.setattr(mbpo, "errors_on_new", errors)
    counts = {"total_timesteps": 75, "model_train_frequency": 15, "run_root": str(tmp_path)}
    obs = Outcome(mbpo, small("mbpo", **counts)).rows[:, :4]
    assert_equal(asked, [(obs[40:55], obs[:55], 30), (obs[55:70], obs[:70], 30 + 5)])


class Fit:
    """A fit whose updates note the rows that they get, and set made-up weights.

    Actions are distinct numbers, by which rows can be told; all else is zero, so that a member
    that predicts a constant has its square as error.
    """

    def __init__(self, cell, errors: list[list[float]], n: int = 100, **settings):
        self.cell, self.errors, self.given = cell, torch.tensor(errors), []
        members, zero = self.errors.shape[1], torch.zeros(n)
        settings = {"ensemble_size": members, "num_elites": 1} | settings
        self.args = cell.script.Args(**cell.options, **settings)
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
        parts = self.learner, self.data, updates, self.update, self.args, seeded()
        model, metrics = self.cell.script.fit_ensemble(*parts)
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
    ("n", "ratio", "size"), [(100, 0.2, 20), (103, 0.25, 25), (26_000, 0.2, 5000)]
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
    inputs = torch.cat([fit.data.obs, fit.data.action], 1)
    assert_close(model["inputs"], mbpo.fit_scaler(inputs[train]), rtol=1e-4, atol=1e-5)
    assert ("targets" in model) == cell.scaled
    if cell.scaled:
        assert_close(model["targets"], mbpo.fit_scaler(targets[train]), rtol=1e-4, atol=1e-5)
        targets = mbpo.normalize(targets, model["targets"])
    assert_close(metrics["holdout_mse"], ((targets[holdout] - 1) ** 2).mean())


NAN = math.nan


@pytest.mark.parametrize("n", [100, 900])  # of 80 and 720 rows an epoch is 1 and 3 updates
@pytest.mark.parametrize(
    ("table", "patience", "best"),  # holdout errors, a row per epoch; the last one stays
    [
        ([[4.0, 9, 1, 6], [5, 2, 3, 5], [8, 3, 3, 4], [9] * 4], 2, [1, 2, 1, 3]),
        ([[1.0], [0.995], [0.98]], 1, [3]),  # 0.5 % is no gain
        ([[0.994**i] for i in range(9)], 2, [9]),  # two times 0.6 % in a row are one
        ([[1.0, 1], [1, 1], [0.5, 1], [0.5, 1], [0.5, 0.5], [0.5, 0.5]], 1, [3, 5]),  # in turns
        ([[1.0, 1], [NAN, 0.5], [NAN, NAN]], 2, [1, 2]),  # NaN is no gain
    ],
)
def test_stop_early_keeps_each_members_last_gain(table, patience, best, n):
    """It ends `patience` + 1 epochs after the last gain of 1 %; members go back to their own.

    The bounds, which members share, are the last ones.
    """
    epoch = math.ceil(0.8 * n / 256)
    errors = [row for row in table for _ in range(epoch)]
    fit = Fit(CELLS["mbpo"], errors, n, model_patience=patience)
    model, metrics = fit.run(1)
    last = epoch * (max(best) + patience + 1)
    assert metrics["loss"] == len(fit.given) == last
    params = model["learner"]["params"]
    for tensor in params["layers"][0]:
        assert tensor.eq(epoch * torch.tensor(best)[:, None, None]).all()
    assert params["max_log_var"].eq(last).all()
    assert metrics["updates"].item() == pytest.approx(epoch * sum(best) / len(best))
    least = min(table[min(row, len(table)) - 1][e] for e, row in enumerate(best))
    assert metrics["holdout_mse"].item() == pytest.approx(least)


@pytest.mark.parametrize(
    ("schedule", "horizons"),
    [
        ((20, 60, 1, 5), {0: 1, 20: 1, 29: 1, 30: 2, 39: 2, 45: 3, 59: 4, 60: 5, 99: 5}),
        ((0, 10, 5, 1), {0: 5, 1: 4, 5: 3, 9: 1, 10: 1, 20: 1}),
    ],
)
def test_rollout_horizon_is_on_the_line(schedule, horizons):
    """Between START and END it is the line's whole part; before and after, FROM and TO."""
    assert {step: mbpo.rollout_horizon(step, schedule) for step in horizons} == horizons


class Walk:
    """A scripted model: state (branch, steps so far); notes choices and noise."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.choices, self.noises = torch.tensor(lengths), [], []

    def step(self, model, actor, obs, choice, noise):
        """One step on; the action tells the step, the reward the branch and the step."""
        self.choices.append(choice), self.noises.append(noise)
        next_obs = obs + torch.tensor([0.0, 1.0])
        return next_obs[:, 1:].expand(-1, 3) / 10, next_obs, 100 * obs[:, 0] + obs[:, 1]

    def terminates(self, obs, action, next_obs):
        """Branch b ends with its step lengths[b], and would not with any later one."""
        return next_obs[:, 1] == self.lengths[obs[:, 0].long()]

    def rollout(self, horizon: int):
        """Rows of a rollout from every branch's start, by a model of three elites."""
        n, model = len(self.lengths), {"elites": torch.arange(3)}
        obs = torch.stack([torch.arange(n), torch.zeros(n)], 1)
        starts = mbpo.Batch(obs, torch.zeros(n, 3), torch.zeros(n), obs + 7, torch.ones(n))
        return mbpo.rollout(model, "actor", starts, horizon, self.step, self.terminates, seeded())


def test_rollout_branches_stop_where_they_terminate():
    """A branch's rows end with its termination, marked as such; the others go on to the end."""
    rows, expected = Walk([1, 3, 99, 2, 4]).rollout(4), []
    for t in range(4):
        for branch, length in enumerate([1, 3, 99, 2, 4]):
            if t < length:
                action, end = [(t + 1) / 10] * 3, float(t + 1 == length)
                expected.append([branch, t, *action, 100 * branch + t, branch, t + 1, end])
    assert_close(rows, torch.tensor(expected, dtype=torch.float32))


def test_every_branch_draws_an_elite_and_noise_at_every_step():
    """Elites are drawn evenly, anew for each branch and step; so is the noise."""
    walk = Walk([99] * 2000)
    walk.rollout(3)
    choices = torch.stack(walk.choices)  # [3, 2000]
    for t in range(3):
        counts = choices[t].bincount(minlength=3)
        assert (counts - 2000 / 3).abs().max() < 110  # five standard deviations
        agree = (choices[t] == choices[t - 1]).float().mean()
        assert abs(agree - 1 / 3) < 0.053  # another draw than at the step before
    for parts in zip(*walk.noises, strict=True):  # the action's; the model's, of S + 1 = 3
        noise = torch.stack(parts)
        assert noise.shape == (3, 2000, 3)
        assert noise.unique().numel() > 0.99 * noise.numel()
        assert_close(noise.mean(), torch.tensor(0.0), rtol=0, atol=0.04)
        assert_close(noise.std(), torch.tensor(1.0), rtol=0, atol=0.03)
