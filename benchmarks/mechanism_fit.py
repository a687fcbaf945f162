"""What mechanism.py measures: transitions, baselines, targets, one network's fit to them."""

import warnings
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import InputError, load_script, load_task
from torch import Tensor
from torch.func import functional_call

mbrl = load_script("mbpo_residual_ablation.py")
CELLS = {  # and what the network predicts there, at unit scale if not raw
    "raw residual": "s' - s, raw",
    "raw direct": "s', raw",
    "normalized residual": "s' - s",
    "normalized direct": "s'",
    "normalized per-dimension": "s' - w s - c",
    "normalized ridge": "what ridge regression leaves",
}
RIDGE = 1e-3  # penalty of ridge regression on inputs at unit scale, against a sum over transitions
DATA_SEED = 0  # of the transitions, which all seeds of fits share


def load_run(folder: Path) -> tuple[str, dict, Tensor]:
    """Of a run: its task, the actor's parameters, the rows [N, 2S + A + 2] of its replay buffer."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True)
        return saved["settings"]["env_id"], saved["agent"]["actor"]["params"], saved["rows"]
    except Exception:  # torch.load has no error of its own
        raise InputError(f"{folder}: no checkpoint.pt is there, or it is damaged") from None


@lru_cache(maxsize=1)  # the fits to one data set come one after another
def transitions_of(task: str, run: Path | None, buffer: bool, count: int) -> tuple[Tensor, Tensor]:
    """x = [s, a, 1] [N, S + A + 1] and y = [s', r] [N, S + 1], float64 of the buffer's float32."""
    _, actor, rows = load_run(run) if run else (task, None, None)
    load_task(task)
    env = mbrl.make_env(task)
    states, actions = env.observation_space.shape[0], env.action_space.shape[0]
    rows = rows[:count] if buffer and run else collect(env, actor, count)
    env.close()
    s, a, r, s_next, _ = rows.double().split([states, actions, 1, states, 1], 1)
    return torch.cat([s, a, torch.ones_like(r)], 1), torch.cat([s_next, r], 1)


def collect(env, actor: dict | None, count: int) -> Tensor:
    """New transitions, rows as of the replay buffer; resets are seeded as in training."""
    (states,), (actions,) = env.observation_space.shape, env.action_space.shape
    nets = {"actor": mbrl.mlp(states, 2 * actions)}
    draw = {"generator": torch.Generator().manual_seed(DATA_SEED)}
    rows, episodes, over = [], iter(range(count)), True
    for _ in range(count):
        if over:
            obs, _ = env.reset(seed=mbrl.derive_seed(DATA_SEED, 0, next(episodes)))
        if actor is None:
            action = 2 * torch.rand(actions, **draw) - 1
        else:
            state, noise = torch.as_tensor(obs).float(), torch.randn(actions, **draw)
            action, _ = mbrl.sample_action(nets, actor, state, noise)
        next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
        rows.append(np.concatenate([obs, action, [reward], next_obs, [terminated]]))
        obs, over = next_obs, terminated or truncated
    return torch.as_tensor(np.array(rows)).float()


def baseline(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """W [S + A + 1, S + 1] of the baseline [s, a, 1] W, from x [N, S + A + 1] and y [N, S + 1]."""
    states = y.shape[1] - 1
    own = torch.block_diag(torch.eye(states), torch.zeros(x.shape[1] - states, 1)).double()
    if kind in ("residual", "direct"):
        return own * (kind == "residual")
    center, scale = mbrl.fit_scaler(x[:, :-1])
    z, mean = (x[:, :-1] - center) / scale, y.mean(0)
    gram, moments = z.T @ z, z.T @ (y - mean)
    if kind == "per-dimension":
        gram, moments = gram.diag().diag(), moments * own[:-1]
    penalty = RIDGE * torch.eye(len(gram), dtype=x.dtype)
    w = torch.linalg.solve(gram + penalty, moments) / scale[:, None]
    return torch.cat([w, (mean - center @ w)[None]])


def units(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By part of [s', r], the variances [S + 1] that errors are divided by; nan where not of it."""
    states = torch.arange(y.shape[1]) < y.shape[1] - 1
    s = torch.cat([x[:, : y.shape[1] - 1], torch.zeros(len(x), 1)], 1)
    before, after, change = (v.var(0, correction=0) for v in (s, y, y - s))
    after = after.where(change > 1e-24, torch.nan)  # as in fit_scaler
    change = change.where(states & (change > 1e-24), torch.nan)
    return {
        "reward": after.where(~states, torch.nan),
        "state": after.where(states, torch.nan),
        "change": change,
        "slow": change.where(change < 0.1 * before, torch.nan),
        "fast": change.where(change >= 0.1 * before, torch.nan),
    }


def measure_scales(x: Tensor, y: Tensor) -> tuple[dict, Tensor]:
    """The scales of a task's targets, and rho [S + 1], the correlations of s_i and s'_i."""
    unit, before = units(x, y), x[:, : y.shape[1]].var(0, correction=0)
    after, change, reward = unit["state"], unit["change"], unit["reward"][-1]
    left = ((y - x @ baseline("ridge", x, y)) ** 2).mean(0)
    scales = {
        "mean_reward": y[:, -1].mean(),
        "reward_variance": reward,
        "residual_over_reward": change.nansum() / reward,
        "direct_over_reward": after.nansum() / reward,
        "ridge_leaves_of_states": (left / after).nanmean(),
        "ridge_leaves_of_reward": left[-1] / reward,
    }
    rho = (before + after - change) / (2 * (before * after).sqrt())
    return {name: float(value) for name, value in scales.items()}, rho


def pose(cell: str, x: Tensor, y: Tensor, train: Tensor) -> tuple:
    """Inputs [N, S + A], targets and baseline [N, S + 1], (m, d) [S + 1]; all fitted to `train`."""
    scale, kind = cell.split()
    base = x @ baseline(kind, x[train], y[train])
    inputs, targets = x[:, :-1].float(), (y - base).float()
    raw = torch.zeros(y.shape[1]), torch.ones(y.shape[1])
    scaler = mbrl.fit_scaler(targets[train]) if scale == "normalized" else raw
    inputs = mbrl.normalize(inputs, mbrl.fit_scaler(inputs[train]))
    return inputs, mbrl.normalize(targets, scaler), base, scaler


def batches(train: Tensor, draw: dict) -> Iterator[Tensor]:
    """Rows [256] for one update after another: a bootstrap sample, each epoch in a new order."""
    sample = train[torch.randint(len(train), (len(train),), **draw)]
    while True:
        shuffled = sample[torch.randperm(len(train), **draw)]
        for first in range(0, len(train), 256):
            yield shuffled[torch.arange(first, first + 256) % len(train)]  # the last is filled up


@lru_cache(maxsize=1)  # what is compiled serves all fits of a shape
def network(shape: tuple[int, ...], lr: float, compiled: bool) -> tuple:
    """An ensemble of this shape, and update(learner, inputs, targets)."""
    net, args = mbrl.Ensemble(*shape), mbrl.Args(model_lr=lr, compile=compiled)
    return net, mbrl.setup_torch(args, "cpu")(partial(mbrl.model_update, net=net, args=args))


def fit(task: str, run: Path | None, lr: str, seed: int, cell: str, options) -> dict:
    """One fit, in a worker: its rows of each CSV file. All draws follow from the seed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries' words about libraries
    x, y = transitions_of(task, run, options.buffer, options.transitions)
    unit, (scales, rho), fits = units(x, y), measure_scales(x, y), []
    draw = {"generator": torch.Generator().manual_seed(seed)}
    order, held_out = torch.randperm(len(x), **draw), int(mbrl.Args.holdout_ratio * len(x))
    holdout, train = order.tensor_split([min(held_out, 5000)])
    inputs, targets, base, (m, d) = pose(cell, x, y, train)
    shape = 1, x.shape[1] - 1, y.shape[1], mbrl.Args.model_hidden
    net, update = network(shape, float(lr), options.compile)
    torch.manual_seed(seed)  # for the initial weights
    learner, indices = mbrl.adam_init(mbrl.Ensemble(*shape), "cpu"), batches(train, draw)
    for updates in range(1, max(options.budgets) + 1):
        index = next(indices)
        learner, _ = update(learner, inputs[index][None], targets[index][None])
        if updates in options.budgets:
            out = functional_call(net, learner["params"], (inputs[holdout],))
            mean, log_var = (part[0].double() for part in out)
            error = ((base[holdout] + m + d * mean - y[holdout]) ** 2).mean(0)
            sampled = error + (d**2 * log_var.exp()).mean(0)
            means = {f"{part}_error": (error / unit[part]).nanmean() for part in unit}
            means |= {f"{part}_sampled": (sampled / unit[part]).nanmean() for part in unit}
            fits.append({"updates": updates} | {name: float(means[name]) for name in means})
    data = {"task": task, "data": run.name if run else "random"}
    key = data | {"lr": lr, "seed": seed, "cell": cell}
    dimensions = {"dimension": range(len(rho)), "rho": rho, "error": sampled / unit["state"]}
    return {  # the last says that it is done
        "dimensions": pd.DataFrame(dimensions).dropna().assign(**key),
        "scales": pd.DataFrame([data | scales]),
        "fits": pd.DataFrame(fits).assign(transitions=options.transitions, **key),
    }
