# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.1", "mujoco==3.17.0", "tyro>=0.9",
#   "dm_control==1.0.50", "shimmy>=2.0", "numpy>=1.26", "tensorboard>=2.18"]
# ///
"""FTFL: MBPO with the two repairs of "Fixing That Free Lunch", arXiv 2510.01457 (Barkley 2025).

An ensemble of E Gaussian networks, each on its own bootstrap sample of the real transitions, learns
to predict the next state and the reward. x is (s, a) at unit scale, y is what a network predicts:

    target        y = ([s', r] - m) / d,   mean m and standard deviation d of each dimension
    model         p_e(y | x) = N(mu_e(x), diag sigma_e^2(x)),   e = 1 ... E
    loss          sum_e E[(mu_e - y)^2 / sigma_e^2 + log sigma_e^2], mean over dimensions
    prediction    [s', r] = m + d y,   y ~ p_e, e drawn among the elites
    rollouts      of one step, from random real states, by the policy, fill the synthetic buffer
    SAC           as in sac.py, on batches of 5 % real and 95 % synthetic transitions

Run: python mbpo_ftfl.py --env-id dmc/walker-run --seed 3
Repair 1: targets at unit scale. Repair 2: s' is predicted, where mbpo.py predicts s' - s.
MBPO is Janner et al. 2019, "When to Trust Your Model", arXiv 1906.08253.
Sources in brackets: SAC is Haarnoja et al. 2018, arXiv 1812.05905; MBPO the code of its authors,
github.com/jannerm/mbpo; STFL that of FTFL's authors, github.com/CLeARoboticsLab/STFL.
"""

import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib import import_module, util
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Literal, NamedTuple, get_args

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import grad_and_value
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.tensorboard import SummaryWriter

VERSION = 1  # is raised only when the same settings give another learning curve


# --- Arguments ------------------------------------------------------------------------------------
@dataclass
class Args:
    env_id: str = "dmc/walker-run"  # dmc/<domain>-<task>, a Gymnasium id, or <module>:<id>
    seed: int = 1  # seed of weights, noise and environments
    total_timesteps: int = 500_000  # environment steps (STFL)
    learning_starts: int = 10_000  # steps of uniform random actions, a part of the total (STFL)
    updates_per_step: int = 20  # SAC updates per environment step (STFL; MBPO: by task)
    ensemble_size: int = 7  # networks in the ensemble (MBPO, STFL)
    num_elites: int = 5  # networks that rollouts draw from, of least holdout error (MBPO, STFL)
    model_hidden: int = 200  # units in each of the four hidden layers (MBPO, STFL)
    model_lr: float = 1e-3  # Adam step size of the ensemble (MBPO; STFL: 3e-4)
    model_beta: float = 0.0  # weighs the loss by sigma^(2 beta) (beta-NLL, arXiv 2203.09168)
    model_train_frequency: int = 250  # environment steps between fits (MBPO, STFL)
    model_first_updates: int = 10_000  # gradient steps of the first fit (STFL: 5,000)
    model_updates: int = 500  # gradient steps of every later fit (STFL: 5,000)
    model_patience: int | None = None  # in place of both counts: epochs without 1 % gain (MBPO: 5)
    holdout_ratio: float = 0.2  # share of the real transitions held out, at most 5,000 (MBPO)
    rollouts_per_step: int = 400  # model rollouts per environment step (MBPO, STFL)
    rollout_schedule: tuple[int, int, int, int] = (0, 1, 1, 1)  # steps START END, horizons FROM TO
    real_ratio: float = 0.05  # share of real transitions in a batch, rounded down (MBPO; STFL: up)
    never_terminates: bool = False  # the task has no termination (for ids not in HEALTHY)
    batch_size: int = 256  # transitions per SAC update (SAC, table 1; MBPO, STFL)
    gamma: float = 0.99  # discount factor (SAC, table 1; MBPO, STFL)
    tau: float = 0.005  # step of the target networks towards the critics (SAC, table 1; MBPO, STFL)
    policy_lr: float = 3e-4  # Adam step size of the actor (SAC, table 1; MBPO, STFL)
    q_lr: float = 3e-4  # Adam step size of critics and temperature (SAC, table 1; MBPO, STFL)
    autotune: bool = True  # learn the temperature (SAC, section 5; MBPO, STFL)
    alpha: float = 1.0  # temperature to start from (MBPO, STFL), or to keep with --no-autotune
    target_entropy: float | None = None  # nats; None: -(action dimensions) / 2 (STFL; SAC: twice)
    buffer_size: int = 1_000_000  # real transitions kept (SAC, table 1; MBPO, STFL)
    eval_frequency: int = 5_000  # environment steps between evaluations, 0 for none (STFL)
    eval_episodes: int = 10  # episodes by mean actions per evaluation (STFL); a fifth more: sampled
    checkpoint_frequency: int = 10_000  # steps between checkpoints, at an episode's end; 0: none
    run_root: str = "runs"  # folder of the run folders (CleanRL)
    exp_name: str = Path(__file__).stem  # middle part of the run folder's name (CleanRL)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = True  # compile the updates with torch.compile
    precision: Literal["exact", "fast"] = "exact"  # fast: products may round to bfloat16 or TF32
    track: bool = False  # log to Weights & Biases, too (CleanRL); WANDB_PROJECT, _ENTITY say where
    capture_video: bool = False  # record the first episode of every evaluation (CleanRL)
    resume: bool = False  # go on from the checkpoint in the run folder


# --- Replay ---------------------------------------------------------------------------------------
class Batch(NamedTuple):  # transitions; S, A: numbers in a state, an action; ...: any batch shape
    obs: Tensor  # [..., S]
    action: Tensor  # [..., A], in [-1, 1]
    reward: Tensor  # [...]
    next_obs: Tensor  # [..., S]
    terminated: Tensor  # [...], 1 where the task ended the episode, 0 at a time limit


class ReplayBuffer:
    """Ring of the last `capacity` transitions, each a row [s, a, r, s', terminated]."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.parts = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.parts), device=device)  # [capacity, 2S + A + 2]
        self.added = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """Adds rows [N, 2S + A + 2], over the oldest ones once the ring is full."""
        index = torch.arange(self.added, self.added + len(rows), device=rows.device)
        self.rows[index % len(self.rows)] = rows
        self.added += len(rows)

    def sample(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Rows [*shape, 2S + A + 2], drawn uniformly with replacement."""
        index = torch.randint(len(self), shape, generator=generator, device=generator.device)
        return self.rows[index]

    def unpack(self, rows: Tensor) -> Batch:
        """The parts of rows [..., 2S + A + 2]."""
        obs, action, reward, next_obs, terminated = rows.split(self.parts, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))

    def newest(self, n: int) -> Tensor:
        """The last n rows [n, 2S + A + 2], in order of age."""
        ages = torch.arange(self.added - n, self.added, device=self.rows.device)
        return self.rows[ages % len(self.rows)]

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"rows": self.rows[: len(self)].clone(), "added": self.added}

    def load(self, state: dict) -> None:
        """Takes up a checkpoint's state."""
        self.rows[: len(state["rows"])] = state["rows"]
        self.added = state["added"]


# --- Networks -------------------------------------------------------------------------------------
# A network is a function of its parameters, a list of (weight [in, out], bias [out]), one a layer.
# Several networks in one are stacked on a leading axis: weight [N, in, out], bias [N, 1, out].


def init_mlp(in_dim: int, out_dim: int, hidden: int = 256) -> list:
    """Two hidden layers (SAC, table 1); orthogonal with gain sqrt 2 (STFL), biases of zero."""
    sizes = pairwise([in_dim, hidden, hidden, out_dim])
    weights = [nn.init.orthogonal_(torch.empty(*size), math.sqrt(2)) for size in sizes]
    return [(weight, torch.zeros(weight.shape[1])) for weight in weights]


def mlp(params: list, x: Tensor, activation: Callable = F.relu) -> Tensor:
    """The output [..., out] for x [..., in]; of N stacked networks [N, B, out] for x [B, in]."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = activation(x @ w + b)
    return x @ weight + bias


def init_actor(obs_dim: int, action_dim: int) -> list:
    """Parameters of `actor`."""
    return init_mlp(obs_dim, 2 * action_dim)


def actor(params: list, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log standard deviation [..., A] of the normal before its tanh, obs [..., S]."""
    mean, log_std = mlp(params, obs).chunk(2, -1)
    return mean, -10 + 6 * (1 + torch.tanh(log_std))  # in [-10, 2] (STFL)


def sample_action(params: list, obs: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """a = tanh(u), u = mean + std * noise [..., A], and log pi(a | s) [...] (SAC, equation 26)."""
    mean, log_std = actor(params, obs)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return torch.tanh(u), (log_normal - log_jacobian).sum(-1)


def init_critic(obs_dim: int, action_dim: int) -> list:
    """Parameters of `critic`, of the twins stacked."""
    one, two = init_mlp(obs_dim + action_dim, 1), init_mlp(obs_dim + action_dim, 1)
    weights = [torch.stack([w1, w2]) for (w1, _), (w2, _) in zip(one, two, strict=True)]
    biases = [torch.stack([b1, b2])[:, None] for (_, b1), (_, b2) in zip(one, two, strict=True)]
    return list(zip(weights, biases, strict=True))


def critic(params: list, obs: Tensor, action: Tensor) -> Tensor:
    """Values [2, B] that the twins give to actions [B, A] in states [B, S]."""
    return mlp(params, torch.cat([obs, action], -1)).squeeze(-1)


# --- Optimizer ------------------------------------------------------------------------------------
# Adam is written as a pure function, so that torch.compile makes one graph of a whole update.
# A learner is a dictionary: parameters, the moments m and v of their gradients, and steps t so far.
# tree_map(f, a, b) calls f with each pair of tensors of two such nests of lists and dictionaries.


def adam_init(params, device: torch.device) -> dict:
    """The learner that starts from these parameters."""
    params = tree_map(lambda p: p.to(device, copy=True), params)
    m, v = tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params)
    return {"params": params, "m": m, "v": v, "t": torch.zeros((), device=device)}


def adam_step(learner: dict, grads, lr: float) -> dict:
    """The learner after one step (Kingma & Ba 2015, algorithm 1, with its default constants)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    t = learner["t"] + 1
    m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, learner["m"], grads)
    v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g**2, learner["v"], grads)
    m_scale, v_scale = 1 / (1 - beta1**t), 1 / (1 - beta2**t)

    def step(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        return p - lr * m * m_scale / ((v * v_scale).sqrt() + eps)

    return {"params": tree_map(step, learner["params"], m, v), "m": m, "v": v, "t": t}


def compiled_update(update: Callable, args: Args) -> Callable:
    """A compiled function (state, *inputs) -> metrics that writes the new state over the old.

    update(state, *inputs, args) -> (new state, metrics) is pure. The state's tensors keep their
    addresses, so that on a GPU the whole is replayed as a CUDA graph.
    """

    def update_in_place(state: dict, *inputs):
        new, metrics = update(state, *inputs, args)
        tree_map(Tensor.copy_, state, new)
        return metrics

    how = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
    return torch.compile(update_in_place, **how, disable=not args.compile)


# --- SAC ------------------------------------------------------------------------------------------
def init_agent(obs_dim: int, action_dim: int, alpha: float, device: torch.device) -> dict:
    """All that a SAC update changes: three learners (see adam_init) and the target critics."""
    critic_params = init_critic(obs_dim, action_dim)
    return {
        "actor": adam_init(init_actor(obs_dim, action_dim), device),
        "critic": adam_init(critic_params, device),
        "log_alpha": adam_init(torch.tensor(math.log(alpha)), device),
        "target": tree_map(lambda p: p.to(device, copy=True), critic_params),
    }


def sac_update(agent: dict, batch: Batch, noise: Tensor, args: Args) -> tuple[dict, dict]:
    """One update on B transitions with noise [2, B, A]: noise[0] for a', noise[1] for a.

    A pure function; returns the new agent and metrics. Order: critics, targets, the actor against
    the new critics, temperature (STFL). grad_and_value(f)(params) differentiates by `params` alone:
    all else is constant, as if detached. f returns a loss and something to keep.
    """
    alpha = agent["log_alpha"]["params"].exp()
    target_entropy = args.target_entropy
    if target_entropy is None:
        target_entropy = -batch.action.shape[-1] / 2

    next_action, next_log_prob = sample_action(agent["actor"]["params"], batch.next_obs, noise[0])
    next_q = critic(agent["target"], batch.next_obs, next_action).amin(0)  # [B]
    y = batch.reward + args.gamma * (1 - batch.terminated) * (next_q - alpha * next_log_prob)

    def critic_loss(params):
        q = critic(params, batch.obs, batch.action)  # [2, B]
        return ((q - y) ** 2).mean(1).sum(), q.mean()

    grads, (q_loss, q) = grad_and_value(critic_loss, has_aux=True)(agent["critic"]["params"])
    new_critic = adam_step(agent["critic"], grads, args.q_lr)

    target = tree_map(  # (1 - tau) old + tau new
        lambda old, new: torch.lerp(old, new, args.tau), agent["target"], new_critic["params"]
    )

    def actor_loss(params):
        action, log_prob = sample_action(params, batch.obs, noise[1])
        q = critic(new_critic["params"], batch.obs, action).amin(0)  # [B]
        return (alpha * log_prob - q).mean(), -log_prob.mean()

    grads, (pi_loss, entropy) = grad_and_value(actor_loss, has_aux=True)(agent["actor"]["params"])
    new_actor = adam_step(agent["actor"], grads, args.policy_lr)

    log_alpha = agent["log_alpha"]
    if args.autotune:  # the gradient of alpha (entropy - target) by log alpha is the same again
        log_alpha = adam_step(log_alpha, alpha * (entropy - target_entropy), args.q_lr)

    new = {"actor": new_actor, "critic": new_critic, "log_alpha": log_alpha, "target": target}
    metrics = {"q_loss": q_loss, "q": q, "actor_loss": pi_loss, "entropy": entropy, "alpha": alpha}
    return new, metrics


# --- Model ----------------------------------------------------------------------------------------
def init_ensemble(size: int, in_dim: int, out_dim: int, hidden: int) -> dict:
    """Parameters of `ensemble`: five layers of E stacked networks, and bounds of the log variance.

    Weights from a normal of deviation 1 / (2 sqrt(in)), cut off at two of it; zero biases (MBPO).
    """
    layers = []
    for fan_in, fan_out in pairwise([in_dim, hidden, hidden, hidden, hidden, 2 * out_dim]):
        std = 1 / (2 * math.sqrt(fan_in))
        weight = torch.empty(size, fan_in, fan_out)
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        layers.append((weight, torch.zeros(size, 1, fan_out)))
    high, low = torch.full((out_dim,), 0.5), torch.full((out_dim,), -10.0)  # MBPO
    return {"layers": layers, "max_log_var": high, "min_log_var": low}


def ensemble(params: dict, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance [E, B, S + 1] of E networks, given x [E, B, S + A] or [B, S + A].

    The log variance is softly clamped between learned bounds (PETS, Chua et al. 2018, A.1).
    """
    mean, log_var = mlp(params["layers"], x, F.silu).chunk(2, -1)
    high, low = params["max_log_var"], params["min_log_var"]
    log_var = high - F.softplus(high - log_var)
    return mean, low + F.softplus(log_var - low)


def fit_scaler(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [n] of rows [N, n].

    A dimension that hardly varies gets its magnitude in place of its deviation, or it would explode
    when it does vary later; one that is always 0 gets 1.
    """
    std, mean = torch.std_mean(x, 0, correction=0)
    magnitude = x.abs().amax(0)
    std = torch.where(std < 1e-3 * magnitude, magnitude, std)
    return mean, torch.where(std < 1e-12, 1.0, std)


def normalize(x: Tensor, scaler: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., n] at zero mean and unit standard deviation."""
    mean, std = scaler
    return (x - mean) / std


def model_targets(data: Batch) -> Tensor:
    """What the ensemble learns, [N, S + 1]: s' and r, before they are scaled."""
    return torch.cat([data.next_obs, data.reward[:, None]], -1)  # repair 2


def predict(model: dict, obs: Tensor, action: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [K, B, S + 1] of s' and r, as K elites predict them."""
    x = normalize(torch.cat([obs, action], -1), model["inputs"])
    params, elites = model["learner"]["params"], model["elites"]
    layers = [(weight[elites], bias[elites]) for weight, bias in params["layers"]]
    mean, log_var = ensemble(params | {"layers": layers}, x)
    std = torch.exp(log_var / 2)
    m, d = model["targets"]  # repair 1
    return m + d * mean, d * std


def model_update(learner: dict, x: Tensor, y: Tensor, args: Args) -> tuple[dict, Tensor]:
    """One step on inputs x [E, B, S + A], targets y [E, B, S + 1]; returns the learner, the loss.

    A pure function. loss = sum_e mean[sigma^(2 beta) ((mu - y)^2 / sigma^2 + log sigma^2)]
    + 0.01 sum(max - min log variance) + sum_l decay_l |W_l|^2 / 2 (MBPO, where beta is 0).
    """

    def loss_of(params):
        mean, log_var = ensemble(params, x)
        nll = (mean - y) ** 2 * torch.exp(-log_var) + log_var  # [E, B, S + 1]
        weight = torch.exp(args.model_beta * log_var).detach()  # sigma^(2 beta)
        spread = (params["max_log_var"] - params["min_log_var"]).sum()
        rates = 2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4  # of the five layers (MBPO)
        weights = [w for w, _ in params["layers"]]
        decay = sum(rate / 2 * (w**2).sum() for rate, w in zip(rates, weights, strict=True))
        return (weight * nll).mean((1, 2)).sum() + 0.01 * spread + decay

    grads, loss = grad_and_value(loss_of)(learner["params"])
    return adam_step(learner, grads, args.model_lr), loss


def fit_ensemble(learner: dict, data: Batch, updates: int, update: Callable, args: Args, generator):
    """Fits the ensemble further to N real transitions; returns the model and the fit's metrics.

    Weights and Adam's moments carry over; split, scalers and bootstrap samples are drawn anew. Each
    member takes `updates` steps and keeps its last weights (STFL), or stops early (MBPO). Elites
    have the least error on the holdout, most of which earlier fits have trained on (MBPO).
    """
    x, y = torch.cat([data.obs, data.action], -1), model_targets(data)
    train, holdout = split(len(x), args, generator)
    model = {"learner": learner, "inputs": fit_scaler(x[train])}
    x = normalize(x, model["inputs"])
    model["targets"] = fit_scaler(y[train])  # repair 1: m and d
    y = normalize(y, model["targets"])

    batches = bootstrap_batches(x[train], y[train], args, generator)
    if args.model_patience is None:
        for _ in range(updates):
            loss = update(learner, *next(batches))
    else:
        epoch = math.ceil(len(train) / 256)  # gradient steps
        loss, updates = stop_early(learner, batches, epoch, x[holdout], y[holdout], update, args)

    error = member_errors(learner, x[holdout], y[holdout])
    model["elites"] = error.argsort()[: args.num_elites]
    return model, {"loss": loss, "updates": updates, "holdout_mse": error[model["elites"]].mean()}


def split(n: int, args: Args, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to train on, and of those held out, at most 5,000 (MBPO)."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    held_out = min(int(args.holdout_ratio * n), 5000)
    return order[held_out:], order[:held_out]


def bootstrap_batches(x: Tensor, y: Tensor, args: Args, generator: torch.Generator) -> Iterator:
    """Without end, 256 rows (MBPO) for each member [E, 256, n], from its own bootstrap sample."""
    how = {"generator": generator, "device": generator.device}
    sample = torch.randint(len(x), (args.ensemble_size, len(x)), **how)  # with replacement
    while True:
        rows = sample.gather(1, torch.randint(len(x), (args.ensemble_size, 256), **how))
        yield x[rows], y[rows]


def member_errors(learner: dict, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error [E] of every member, in the units of y."""
    mean, _ = ensemble(learner["params"], x)
    return ((mean - y) ** 2).mean((1, 2))


def stop_early(learner, batches, epoch: int, x: Tensor, y: Tensor, update, args) -> tuple:
    """Trains until no member's error has fallen by 1 % in the last patience + 1 epochs (MBPO).

    Each member then goes back to its weights after its own last fall by 1 %; the bounds of the log
    variance and Adam's moments stay. Returns the last loss and the mean of the gradient steps kept.
    """
    layers = learner["params"]["layers"]
    best = tree_map(Tensor.clone, layers)
    best_error = torch.full_like(layers[0][0][:, 0, 0], math.inf)  # [E]
    kept = torch.zeros_like(best_error)
    done, stale = 0, 0
    while stale <= args.model_patience:
        for _ in range(epoch):
            loss = update(learner, *next(batches))
        done += epoch
        error = member_errors(learner, x, y)
        improved = error < 0.99 * best_error
        best_error[improved], kept[improved] = error[improved], done
        for old, new in zip(tree_leaves(best), tree_leaves(layers), strict=True):
            old[improved] = new[improved]
        stale = 0 if improved.any() else stale + 1
    tree_map(Tensor.copy_, layers, best)
    return loss, kept.mean()


def errors_on_new(model: dict, new: Batch, data: Batch, args: Args) -> dict:
    """How wrong a model is on real transitions that came after it was fitted, so never seen.

    new_reward_error      E[(mean - r)^2] / Var[r]
    new_change_error      E[(sample - s')^2] / Var[s' - s], mean over dimensions; 1: no better than
                          s plus the mean change
    new_reward_std_ratio  E[std of r] / Std[r]
    Expectations over the elites and the new transitions, variances over all data.
    """
    mean, std = predict(model, new.obs, new.action, args)  # [K, B, S + 1]
    truth = torch.cat([new.next_obs, new.reward[:, None]], -1)
    error, spread = ((mean - truth) ** 2).mean((0, 1)), (std**2).mean((0, 1))
    _, change = fit_scaler(data.next_obs - data.obs)
    _, reward = fit_scaler(data.reward[:, None])
    return {
        "new_reward_error": error[-1] / reward[0] ** 2,
        "new_change_error": ((error + spread)[:-1] / change**2).mean(),
        "new_reward_std_ratio": std[..., -1].mean() / reward[0],
    }


# --- Rollouts -------------------------------------------------------------------------------------
def rollout_horizon(step: int, schedule: tuple[int, int, int, int]) -> int:
    """Steps of a rollout: from FROM to TO in a line between START and END, rounded down (MBPO)."""
    start, end, low, high = schedule
    return low + (min(max(step, start), end) - start) * (high - low) // (end - start)


def model_step(model: dict, actor_params, obs: Tensor, choice: Tensor, noise, args) -> tuple:
    """a [B, A], s' [B, S] and r [B] after s [B, S], all sampled: a pure function.

    Branch b follows elite `choice[b]`; noise is that of the action [B, A], the model's [B, S + 1].
    """
    action, _ = sample_action(actor_params, obs, noise[0])
    mean, std = predict(model, obs, action, args)
    branch = torch.arange(len(obs), device=obs.device)
    sample = mean[choice, branch] + std[choice, branch] * noise[1]  # [B, S + 1]
    return action, sample[:, :-1], sample[:, -1]


def rollout(model, actor_params, starts: Batch, horizon, step_model, terminates, generator):
    """Rows of up to `horizon` steps from each of B states; every step draws its elite and noise."""
    how = {"generator": generator, "device": generator.device}
    obs, alive = starts.obs, torch.ones_like(starts.reward, dtype=torch.bool)
    rows, reached = [], []  # of every step: [B, 2S + A + 2], and whether a branch got there [B]
    for _ in range(horizon):
        choice = torch.randint(len(model["elites"]), alive.shape, **how)
        model_noise = torch.randn(len(obs), obs.shape[1] + 1, **how)
        noise = torch.randn(starts.action.shape, **how), model_noise
        action, next_obs, reward = step_model(model, actor_params, obs, choice, noise)
        terminated = terminates(obs, action, next_obs)
        rows.append(torch.cat([obs, action, reward[:, None], next_obs, terminated[:, None]], -1))
        reached.append(alive)
        obs, alive = next_obs, alive & ~terminated
    return torch.cat(rows)[torch.cat(reached)]


def resized(buffer: ReplayBuffer, capacity: int) -> ReplayBuffer:
    """A ring of another capacity with the newest of the buffer's transitions, in order of age."""
    new = ReplayBuffer(capacity, *buffer.parts[:2], buffer.rows.device)
    new.add(buffer.newest(min(capacity, len(buffer))))
    return new


# --- Termination ----------------------------------------------------------------------------------
# Rollouts must end where the task ends. Each function is true where the task goes on after (s, a,
# s') [..., n]: Gymnasium's v5 conditions. A task of your own goes into HEALTHY, too.


def hopper_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    height, angle = next_obs[..., 0], next_obs[..., 1]
    return (height > 0.7) & (angle.abs() < 0.2) & (next_obs[..., 1:].abs() < 100).all(-1)


def walker2d_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    height, angle = next_obs[..., 0], next_obs[..., 1]
    return (height > 0.8) & (height < 2) & (angle.abs() < 1)


def ant_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    height = next_obs[..., 0]
    return (height >= 0.2) & (height <= 1) & next_obs.isfinite().all(-1)


def humanoid_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    height = next_obs[..., 0]
    return (height > 1) & (height < 2)


def inverted_pendulum_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return (next_obs[..., 1].abs() <= 0.2) & next_obs.isfinite().all(-1)


def always_healthy(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
    return torch.ones_like(next_obs[..., 0], dtype=torch.bool)


HEALTHY = {  # by the task's id without its version
    "Hopper": hopper_healthy,
    "Walker2d": walker2d_healthy,
    "Ant": ant_healthy,
    "Humanoid": humanoid_healthy,
    "InvertedPendulum": inverted_pendulum_healthy,
    "HalfCheetah": always_healthy,
    "Swimmer": always_healthy,
    "Reacher": always_healthy,
    "Pusher": always_healthy,
}


def termination_function(args: Args) -> Callable:
    """The task's function (s, a, s') [..., n] -> terminated [...]; InputError if it has none."""
    task = re.sub(r"-v\d+$", "", args.env_id.rpartition(":")[2])
    if args.never_terminates or task.startswith("dmc/"):  # the suite's bounded tasks never do
        healthy = always_healthy
    elif task in HEALTHY:
        healthy = HEALTHY[task]
    else:
        remedy = "add it there, or give --never-terminates"
        raise InputError(f"--env-id {args.env_id}: {task} is not in this file's HEALTHY: {remedy}")
    return lambda obs, action, next_obs: ~healthy(obs, action, next_obs)


def check_termination(terminates: Callable, args: Args, obs, action, next_obs, terminated) -> None:
    """Raises InputError if a real transition, in its own float64, ends unlike `terminates` says."""
    if terminated != bool(terminates(*map(torch.as_tensor, (obs, action, next_obs)))):
        state = ", ".join(f"{x:.4g}" for x in next_obs)
        wrong = "--never-terminates is" if args.never_terminates else "HEALTHY in this file is"
        raise InputError(f"{wrong} wrong for {args.env_id}: {terminated=} where s' = [{state}]")


# --- Environment ----------------------------------------------------------------------------------
class InputError(ValueError):
    """What was asked for can't be done; one line says why and what to do."""


class Checked(gym.Wrapper):
    """Checks and copies what an environment returns, so that nothing wrong gets into the buffer.

    Observations must have the shape of their space; rewards become floats, both flags bools;
    actions are clipped to their bounds. For anything else it raises InputError.
    `reset` seeds the global generators, too, as some environments draw from these.
    """

    def __init__(self, env: gym.Env, env_id: str):
        super().__init__(env)
        self.env_id = env_id

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        for seed_generator in (random.seed, np.random.seed, torch.manual_seed):
            seed_generator(seed or 0)
        returned = self.env.reset(seed=seed, options=options)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            self.refuse(f"reset returned {returned!r}, not (observation, info)")
        return self.observation("reset", returned[0]), returned[1]

    def step(self, action: np.ndarray) -> tuple:
        space = self.action_space
        returned = self.env.step(action.clip(space.low, space.high).astype(space.dtype))
        if not (isinstance(returned, tuple) and len(returned) == 5):
            wanted = "(observation, reward, terminated, truncated, info)"
            self.refuse(f"step returned {returned!r}, not {wanted}")
        obs, reward, terminated, truncated, info = returned
        reward, terminated, truncated = map(self.number, (reward, terminated, truncated))
        return self.observation("step", obs), float(reward), bool(terminated), bool(truncated), info

    def observation(self, call: str, obs) -> np.ndarray:
        """A copy [S] of an observation."""
        space, array = self.observation_space, np.array(obs, order="C")
        if array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
            said = f"an observation of shape {array.shape} and type {array.dtype}"
            self.refuse(f"{call} returned {said}, but its space is {space}")
        return array

    def number(self, value) -> float | bool:
        """The one number in a reward or flag."""
        array = np.asarray(value)
        if array.size != 1 or array.dtype.kind not in "fiub":
            self.refuse(f"step returned {value!r} as a reward or flag, which is not one number")
        return array.item()

    def refuse(self, reason: str) -> None:
        raise InputError(f"--env-id {self.env_id}: {reason}")


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """The task with observations [S], actions in [-1, 1]^A; InputError if it can't be trained."""
    try:
        with warnings.catch_warnings(action="ignore"):  # deprecations within libraries
            env = find_env(env_id, render)
            env.reset(seed=0)  # a fault is better found now than in the run
            env.step(np.zeros(env.action_space.shape, np.float32))
            if render:
                env.render()
    except InputError:
        raise
    except Exception as error:  # of the registry, of the environment, of the renderer
        reason = (str(error).strip(" .\n") or repr(error)).splitlines()[0]
        if "GL" in reason or "glGet" in reason:  # of OpenGL, which draws
            reason += "; try MUJOCO_GL=egl, or apt install libegl1"
        raise InputError(f"--env-id {env_id}: {reason}") from None
    return env


def find_env(env_id: str, render: bool) -> gym.Env:
    """The task of this id, checked and scaled; InputError if there is none, or not of vectors."""
    module, _, name = env_id.rpartition(":")  # <module>:<id> names the module that registers it
    kwargs = {"render_mode": "rgb_array"} if render else {}
    hidden = {"Ant-v5": ["cfrc_ext"]}  # contact forces and the like, left out as in MBPO
    hidden["Humanoid-v5"] = ["cinert", "cvel", "qfrc_actuator", "cfrc_ext"]
    kwargs |= {f"include_{part}_in_observation": False for part in hidden.get(env_id, [])}
    if name.startswith("dmc/"):
        import_module("shimmy")  # registers the suite as dm_control/<domain>-<task>-v0
        name = f"dm_control/{name[4:]}-v0"
        kwargs["render_kwargs"] = {"camera_id": 0}
    if module:
        import_module(module)
    if name not in gym.registry:
        raise InputError(f"--env-id {env_id}: no such task{similar(env_id)}")
    limit = gym.spec(name).max_episode_steps or 1000  # the suite's own limit is 1,000, too
    # Without a limit at first (-1): what a step returns must be checked before TimeLimit takes it.
    env = gym.make(name, max_episode_steps=-1, disable_env_checker=True, **kwargs)
    if isinstance(env.observation_space, gym.spaces.Dict):
        env = gym.wrappers.FlattenObservation(env)
    actions, states = env.action_space, env.observation_space
    boxes = isinstance(actions, gym.spaces.Box) and isinstance(states, gym.spaces.Box)
    if not (boxes and len(actions.shape) == len(states.shape) == 1 and actions.dtype.kind == "f"):
        wanted = "actions and observations must be vectors, the actions of floats"
        raise InputError(f"--env-id {env_id}: {wanted}; not {actions}, {states}")
    if not ((actions.low < actions.high) & (np.maximum(-actions.low, actions.high) < 1e9)).all():
        raise InputError(f"--env-id {env_id}: actions must be bounded, low < high; not {actions}")
    env = gym.wrappers.TimeLimit(Checked(env, env_id), limit)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def similar(env_id: str) -> str:
    """Words that name the tasks whose ids resemble this one, or what ids look like."""
    with suppress(Exception):  # without the suite there are fewer to name
        import_module("shimmy")
    module, colon, name = env_id.rpartition(":")
    ids = [re.sub(r"^dm_control/(.*)-v0$", r"dmc/\1", each) for each in gym.registry]
    near = [module + colon + each for each in difflib.get_close_matches(name, ids)]
    ids = ": ids are dmc/<domain>-<task>, Gymnasium's, and <module>:<id>"
    return f"; did you mean {' or '.join(near)}?" if near else ids


def derive_seed(*numbers: int) -> int:
    """31 bits from (seed, stream, ...), where streams are 0 training, 1 evaluation, 2 weights."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) % 2**31


@contextmanager
def generators_kept():
    """Puts the global generators of Python, numpy and torch back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# --- Evaluation -----------------------------------------------------------------------------------
def play(env: gym.Env, params: list, seed: int, generator: torch.Generator | None) -> tuple:
    """The T transitions of an episode, and log pi(a | s) [T]; by mean actions if no generator."""
    obs, _ = env.reset(seed=seed)
    device, rows, log_probs, over = params[0][0].device, [], [], False
    while not over:
        x = torch.as_tensor(obs, dtype=torch.float32, device=device)
        noise = 0.0
        if generator is not None:
            noise = torch.randn(env.action_space.shape, generator=generator, device=device)
        action, log_prob = sample_action(params, x, noise)
        next_obs, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
        rows.append((obs, action.cpu().numpy(), reward, next_obs, terminated))
        log_probs.append(log_prob)
        obs, over = next_obs, terminated or truncated
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    episode = Batch(*[torch.as_tensor(x, dtype=torch.float32, device=device) for x in columns])
    return episode, torch.stack(log_probs)


def critic_bias(agent: dict, episode: Batch, log_prob: Tensor, gamma: float) -> float:
    """For an episode by sampled actions: the mean over its T steps of min_i Q_i(s_t, a_t) - G_t.

    G_t = r_t + gamma (G_{t+1} - alpha log pi(a_{t+1} | s_{t+1})) is the return that Q predicts. At
    the last step it is r_t if the task ended the episode; at a time limit it is taken to be Q.
    """
    alpha = agent["log_alpha"]["params"].exp()
    q = critic(agent["critic"]["params"], episode.obs, episode.action).amin(0)  # [T]
    soft_return = torch.where(episode.terminated[-1] > 0, episode.reward[-1], q[-1])  # G_t
    bias = q[-1] - soft_return
    for t in reversed(range(len(q) - 1)):
        soft_return = episode.reward[t] + gamma * (soft_return - alpha * log_prob[t + 1])
        bias += q[t] - soft_return
    return float(bias) / len(q)


def evaluation_episodes(args: Args) -> tuple[int, int]:
    """How many are by mean actions, and how many by sampled ones, in which bias is measured."""
    return args.eval_episodes, max(1, args.eval_episodes // 5)


def evaluate(env: gym.Env, agent: dict, args: Args, step: int) -> tuple[list[float], float]:
    """Returns of episodes by mean actions, and the critics' bias in those by sampled actions.

    It uses no random numbers of training, which goes on as if there had been no evaluation.
    """
    params = agent["actor"]["params"]
    generator = torch.Generator(params[0][0].device).manual_seed(derive_seed(args.seed, 1, step))
    returns, biases = [], []
    with generators_kept():
        for i in range(sum(evaluation_episodes(args))):
            seed = derive_seed(args.seed, 1, step, i)
            if i < args.eval_episodes:
                episode, _ = play(env, params, seed, None)
                returns.append(sum(episode.reward.tolist()))  # in Python's float64
            else:
                sampled = play(env, params, seed, generator)
                biases.append(critic_bias(agent, *sampled, args.gamma))
    return returns, np.mean(biases)


# --- Run ------------------------------------------------------------------------------------------
def check_args(args: Args) -> Args:
    """The arguments, numpy's numbers and paths as Python's own; InputError if one can't be."""

    def refuse(name: str, wanted: str):
        flag = name.replace("_", "-")
        raise InputError(f"--{flag} must be {wanted}, not {getattr(args, name)!r}")

    args = replace(args)  # a copy: the caller's stays as it is
    for field in fields(args):
        value = getattr(args, field.name)
        value = str(value) if isinstance(value, Path) else value
        value = value.item() if isinstance(value, np.generic) else value
        setattr(args, field.name, value)
        kinds = [field.type, *get_args(field.type), type(field.default)]  # float | None: both
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            refuse(field.name, f"of type {getattr(field.type, '__name__', field.type)}")

    counts = ["total_timesteps", "learning_starts", "updates_per_step", "batch_size"]
    counts += ["buffer_size", "eval_episodes"]
    counts += ["ensemble_size", "num_elites", "model_hidden", "rollouts_per_step"]
    counts += ["model_train_frequency", "model_first_updates", "model_updates"]
    for name in counts:
        if getattr(args, name) < 1:
            refuse(name, "at least 1")
    for name in ["eval_frequency", "checkpoint_frequency"]:
        if getattr(args, name) < 0:
            refuse(name, "0 or more")
    for name in ["gamma", "tau"]:
        if not 0 < getattr(args, name) <= 1:
            refuse(name, "above 0 and at most 1")
    for name in ["policy_lr", "q_lr", "alpha", "model_lr"]:
        if not 0 < getattr(args, name) < math.inf:
            refuse(name, "above 0 and finite")
    if args.num_elites > args.ensemble_size:
        refuse("num_elites", "at most --ensemble-size")
    if args.model_patience is not None and args.model_patience < 1:
        refuse("model_patience", "at least 1")
    if not 0 <= args.model_beta <= 1:
        refuse("model_beta", "from 0 to 1")
    if not 0 < args.holdout_ratio < 1:
        refuse("holdout_ratio", "above 0 and below 1")
    for name in ["learning_starts", "buffer_size"]:
        if getattr(args, name) < 1 / args.holdout_ratio:
            refuse(name, "at least 1 / --holdout-ratio")
    if not 0 <= args.real_ratio < 1:
        refuse("real_ratio", "at least 0 and below 1")
    if 0 < args.real_ratio * args.batch_size < 1:
        refuse("batch_size", "at least 1 / --real-ratio")
    schedule = args.rollout_schedule
    whole = type(schedule) is tuple and [type(x) for x in schedule] == [int] * 4
    if not whole or schedule[0] >= schedule[1] or min(schedule[2:]) < 1:
        refuse("rollout_schedule", "START END FROM TO, with START < END, FROM and TO above 0")
    if not 0 <= args.seed < 2**63:
        refuse("seed", "from 0 to 2^63 - 1")
    if args.target_entropy is not None and not math.isfinite(args.target_entropy):
        refuse("target_entropy", "a finite number")
    if args.precision not in ["exact", "fast"]:
        refuse("precision", "exact or fast")
    if args.total_timesteps < args.learning_starts:
        refuse("total_timesteps", "at least --learning-starts")
    here = ["cpu", *(name for name in ("cuda", "mps") if getattr(torch, name).is_available())]
    if args.device not in here:
        refuse("device", f"one that is here ({', '.join(here)})")
    if args.capture_video and not util.find_spec("moviepy"):
        raise InputError("--capture-video needs moviepy: pip install moviepy")
    return args


def check_memory(transitions: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
    """Raises InputError if so many transitions do not fit into the device's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    if (size := 4 * transitions * (2 * obs_dim + action_dim + 2)) > memory:
        raise InputError(f"the replay buffers need {size >> 30} GiB, {memory >> 30} GiB exist")


def check_finite(step: int, **quantities) -> None:
    """Raises FloatingPointError, naming quantity and step, for a number that is not finite."""
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {step}: the run stops")


def run_folder(args: Args) -> Path:
    """<run root>/<env id>__<experiment>__<seed>."""
    task = args.env_id.replace("/", "-").replace(":", "-")
    return Path(args.run_root, f"{task}__{args.exp_name}__{args.seed}")


def read_checkpoint(run_dir: Path) -> dict:
    """What a run's checkpoint holds; InputError if there is none, or if it can't be read."""
    file = Path(run_dir, "checkpoint.pt")
    if not file.exists():
        raise InputError(f"{run_dir} holds no checkpoint.pt: no run, or one that saved nothing yet")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no error of its own
        reason = (str(error) or repr(error)).splitlines()[0]
        raise InputError(f"{file} can't be read, it may be damaged: {reason}") from None


def load_policy(run_dir: Path | str, sampled: bool = False) -> Callable:
    """The trained policy: a function from s [..., S] to a [..., A], for what `make_env` returns."""
    params = read_checkpoint(Path(run_dir))["agent"]["actor"]["params"]

    def policy(obs: np.ndarray) -> np.ndarray:
        mean, log_std = actor(params, torch.as_tensor(obs, dtype=torch.float32))
        if sampled:
            mean = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(mean).numpy()

    return policy


def read_run(args: Args) -> tuple[dict, dict | None]:
    """The run's settings, and the checkpoint that it goes on from, or None; writes nothing.

    Raises InputError if the folder holds another run, or one that was not to be resumed.
    """
    run_dir, saved = run_folder(args), None
    settings = {"script": Path(__file__).name, "version": VERSION} | asdict(args)
    settings = json.loads(json.dumps(settings))  # tuples become lists, as args.json has them
    if not os.path.isdir(run_dir) or not any(run_dir.iterdir()):
        return settings, None
    if not args.resume:
        raise InputError(f"{run_dir} holds a run: give --resume, or choose another --exp-name")
    if (run_dir / "checkpoint.pt").exists():
        saved = read_checkpoint(run_dir)
    try:
        held = saved["settings"] if saved else json.loads((run_dir / "args.json").read_text())
        held = dict(held)
    except (OSError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{run_dir} holds no run to go on from: choose another --exp-name"
        ) from None
    free = {"resume", "run_root", "total_timesteps", "checkpoint_frequency", "device", "compile"}
    free |= {"track", "capture_video", "never_terminates"}  # the last: mbpo.py checks it as it goes
    for name in sorted(settings.keys() - free):
        if (was := held.get(name, "unknown to its script")) != settings[name]:
            change = f"{name} {was}, not {settings[name]}"
            raise InputError(f"{run_dir} holds a run with {change}: choose another --exp-name")
    if saved and saved["progress"]["step"] > args.total_timesteps:
        done = saved["progress"]["step"]
        raise InputError(f"{run_dir} has {done} steps: --total-timesteps must not be less")
    return settings, saved


def open_run(args: Args, settings: dict) -> Path:
    """The run's folder, with args.json in it; if it or W&B can't be had, InputError."""
    run_dir = run_folder(args)
    if args.track:
        try:
            names = {"id": run_dir.name, "resume": "allow", "config": settings}
            import_module("wandb").init(**names, reinit=True, sync_tensorboard=True)
        except Exception as error:  # of the network, of the account, of the settings
            remedy = "pip install wandb, then `wandb login` or WANDB_MODE=offline"
            raise InputError(f"--track: {error} ({remedy})") from None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--run-root {args.run_root} can't be written: {error}") from None
    return run_dir


def write_checkpoint(file: Path, state: dict) -> None:
    """Replaces the file in one step; if the disk is full, OSError, and it stays as it was."""
    temporary = file.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from None


class Log:
    """What a run tells: eval.csv, TensorBoard's curves, and a line now and then on stdout."""

    def __init__(self, run_dir: Path, progress: dict, args: Args):
        self.run_dir, self.progress, self.total = run_dir, progress, args.total_timesteps
        self.writer = SummaryWriter(run_dir, purge_step=progress["step"] and progress["step"] + 1)
        text = json.dumps(asdict(args), indent=2)
        self.writer.add_text("hyperparameters", f"```\n{text}\n```", progress["step"])
        self.began = time.perf_counter() - progress["seconds"]
        self.learned = None  # step and time of the first updates, from where speed is measured

    def scalars(self, group: str, step: int, **values) -> None:
        """Adds to the curves <group>/<name>."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def evaluation(self, step: int, returns: list[float], bias: float) -> None:
        """Adds an evaluation to eval.csv and to the curves."""
        self.progress["seconds"] = time.perf_counter() - self.began
        numbers = [np.mean(returns), np.std(returns), min(returns), max(returns), len(returns)]
        line = ",".join(f"{x:.6g}" for x in [*numbers, self.progress["seconds"]])
        self.progress["evaluations"].append(f"{step},{line}")
        text = "\n".join(["step,mean,std,min,max,episodes,seconds", *self.progress["evaluations"]])
        (self.run_dir / "eval.csv").write_text(text + "\n")
        self.scalars("eval", step, **{"return": numbers[0], "critic_bias": bias})
        self.line(step, f"  return {numbers[0]:8.2f} +- {numbers[1]:.2f}")

    def line(self, step: int, text: str = "") -> None:
        """Prints the step, and how fast it goes once updates are made."""
        if self.learned and step > self.learned[0]:
            rate = (step - self.learned[0]) / (time.perf_counter() - self.learned[1])
            left = timedelta(seconds=round((self.total - step) / rate))
            text += f"  {rate:,.1f} steps/s, {left} left"
            self.scalars("train", step, steps_per_second=rate)
        print(f"step {step:7d}{text}", flush=True)


# --- Training -------------------------------------------------------------------------------------
def set_up_torch(args: Args, device: torch.device) -> None:
    """Sets how products of float32 are computed; InputError if nothing can be compiled."""
    torch.compiler.reset()  # or the graphs of several runs in one process count against a limit
    torch.set_float32_matmul_precision("medium")  # so an AMD CPU uses oneDNN, much faster than MKL
    probe = torch.full((256, 256), 1 + 2**-12, device=device)  # TF32 and bfloat16 round it to 1
    rounds = (probe @ probe).amin() < 256.1  # an exact product is 256.125, a rounded one 256
    if args.precision == "exact" and rounds:
        torch.set_float32_matmul_precision("highest")
    unseen = time.time()  # or a kernel from the cache would be taken, which proves nothing
    try:
        torch.compile(lambda x: x.exp() + unseen, disable=not args.compile)(probe)
    except Exception as error:
        lines = str(error).splitlines() or [repr(error)]
        said = [*(line for line in lines if "error:" in line), *lines][0]  # a compiler's own words
        raise InputError(f"torch.compile fails: {said}; mend it or give --no-compile") from None


def train(args: Args, interrupted: Event | None = None) -> dict:
    """Trains; returns eval.csv's lines and the agent. Raises InputError for what can't be done.

    Once `interrupted` is set, the run is saved when its episode ends; then KeyboardInterrupt.
    """
    args = check_args(args)
    run_dir = run_folder(args)
    is_new = not os.path.exists(run_dir)
    progress = {"step": 0, "episode": 0, "seconds": 0.0, "evaluations": []}  # filled in by `learn`
    try:
        return learn(args, progress, interrupted or Event())
    except InputError as error:  # an environment may break its word after some steps
        saved = os.path.exists(run_dir / "checkpoint.pt")
        if is_new and not saved and len(progress["evaluations"]) < 2:  # nothing of worth is lost
            shutil.rmtree(run_dir, ignore_errors=True)
        where = f" (at step {progress['step']})" if progress["step"] else ""
        raise InputError(f"{error}{where}") from None


def learn(args: Args, progress: dict, interrupted: Event) -> dict:
    """Sets up all that a run needs, or takes it up from the checkpoint; then goes step by step."""
    device = torch.device(args.device)
    env, eval_env = make_env(args.env_id), make_env(args.env_id, args.capture_video)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]  # S, A
    terminates = termination_function(args)
    per_horizon = 1000 * args.rollouts_per_step  # synthetic rows kept, per step of horizon (MBPO)
    most = args.buffer_size + per_horizon * max(args.rollout_schedule[2:])
    check_memory(most, obs_dim, action_dim, device)
    settings, saved = read_run(args)
    set_up_torch(args, device)

    torch.manual_seed(derive_seed(args.seed, 2))  # for the initial weights alone
    agent = init_agent(obs_dim, action_dim, args.alpha, device)
    params = init_ensemble(args.ensemble_size, obs_dim + action_dim, obs_dim + 1, args.model_hidden)
    model = {"learner": adam_init(params, device)}
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    horizon = rollout_horizon(saved["progress"]["step"] if saved else 0, args.rollout_schedule)
    synthetic = ReplayBuffer(per_horizon * horizon, obs_dim, action_dim, device)
    generator = torch.Generator(device).manual_seed(args.seed)
    if saved:
        agent = tree_map(lambda x: x.to(device, copy=True), saved["agent"])
        buffer.load(saved["buffer"])
        model = tree_map(lambda x: x.to(device, copy=True), saved["model"])
        synthetic.load(saved["synthetic"])
        progress.update(saved["progress"])
        if len(saved["generator"]) == len(generator.get_state()):  # else of another kind of device
            generator.set_state(saved["generator"])
    for state in (agent, model["learner"]):
        tree_map(torch._dynamo.mark_static_address, state)  # a CUDA graph writes there
    update = compiled_update(sac_update, args)
    update_model = compiled_update(model_update, args)
    how = {"fullgraph": True, "dynamic": False, "disable": not args.compile}
    step_model = torch.compile(partial(model_step, args=args), **how)
    run_dir = open_run(args, settings)
    log = Log(run_dir, progress, args)
    if args.capture_video:
        interval = getattr(eval_env.unwrapped, "dt", None)  # seconds of a step, of MuJoCo's tasks
        how = {"fps": round(1 / interval) if interval else None, "name_prefix": "step-0"}
        how["episode_trigger"] = lambda n: n % sum(evaluation_episodes(args)) == 0
        eval_env = gym.wrappers.RecordVideo(eval_env, str(run_dir / "videos"), **how)
    anew = ": no checkpoint is there to go on from" if args.resume and not saved else ""
    print(f"{run_dir} on {device}, from step {progress['step']}{anew}", flush=True)
    if not saved and args.eval_frequency:
        log.evaluation(0, *evaluate(eval_env, agent, args, 0))

    over, last, checkpointed, metrics = True, True, progress["step"], {}
    for step in range(progress["step"] + 1, args.total_timesteps + 1):
        progress["step"] = step
        if over:  # each episode is seeded, so that a run can be taken up at its start
            obs, _ = env.reset(seed=derive_seed(args.seed, 0, progress["episode"]))
            check_finite(step, observation=obs)
            progress["episode"] += 1
            episode_return, length = 0.0, 0

        # Act
        if step <= args.learning_starts:
            action = 2 * torch.rand(action_dim, generator=generator, device=device) - 1
        else:
            x = torch.as_tensor(obs, dtype=torch.float32).to(device, non_blocking=True)
            noise = torch.randn(action_dim, generator=generator, device=device)
            action, _ = sample_action(agent["actor"]["params"], x, noise)
        action = action.cpu().numpy()  # waits for the device, until all updates are done
        check_finite(step, **metrics, action=action)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        check_finite(step, observation=next_obs, reward=reward)
        check_termination(terminates, args, obs, action, next_obs, terminated)

        # Store
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]])[None]
        buffer.add(torch.as_tensor(row, dtype=torch.float32).to(device, non_blocking=True))
        obs, over = next_obs, terminated or truncated
        episode_return, length = episode_return + reward, length + 1
        if over:
            log.scalars("train", step, episode_return=episode_return, episode_length=length)

        # Fit
        if step >= args.learning_starts:
            if (step - args.learning_starts) % args.model_train_frequency == 0:
                data = buffer.unpack(buffer.rows[: len(buffer)])
                updates = args.model_first_updates
                if "elites" in model:  # it was fitted before
                    updates = args.model_updates
                    new = buffer.newest(min(args.model_train_frequency, len(buffer)))
                    errors = errors_on_new(model, buffer.unpack(new), data, args)
                    log.scalars("model", step, **errors)
                learner = model["learner"]
                model, fit = fit_ensemble(learner, data, updates, update_model, args, generator)
                log.scalars("model", step, **fit)
                check_finite(step, model_loss=fit["loss"])

            # Imagine
            horizon = rollout_horizon(step, args.rollout_schedule)
            if per_horizon * horizon != len(synthetic.rows):
                synthetic = resized(synthetic, per_horizon * horizon)
            starts = buffer.unpack(buffer.sample(args.rollouts_per_step, generator=generator))
            actor_params = agent["actor"]["params"]
            made = rollout(model, actor_params, starts, horizon, step_model, terminates, generator)
            synthetic.add(made)

            # Update
            n, real = args.updates_per_step, int(args.real_ratio * args.batch_size)
            real_rows = buffer.sample(n, real, generator=generator)
            made_rows = synthetic.sample(n, args.batch_size - real, generator=generator)
            rows = torch.cat([real_rows, made_rows], 1)  # [n, batch size, 2S + A + 2]
            sizes = args.updates_per_step, 2, args.batch_size, action_dim
            noise = torch.randn(sizes, generator=generator, device=device)
            for i in range(args.updates_per_step):
                metrics = update(agent, buffer.unpack(rows[i]), noise[i])
            log.learned = log.learned or (step, time.perf_counter())
            if step % 1000 == 0:
                log.scalars("sac", step, **metrics)

        # Evaluate
        last = step == args.total_timesteps
        if args.eval_frequency and (last or step % args.eval_frequency == 0):
            eval_env.name_prefix = f"step-{step}"  # of a video
            log.evaluation(step, *evaluate(eval_env, agent, args, step))
        elif step % 1000 == 0:
            log.line(step)

        # Save
        every = args.checkpoint_frequency
        stop = over and interrupted.is_set()
        if every and (last or stop or (over and step // every > checkpointed // every)):
            weights = tree_leaves((agent["actor"]["params"], agent["critic"]["params"]))
            check_finite(step, **metrics, weights=torch.cat([w.flatten() for w in weights]))
            checkpointed = step
            progress["seconds"] = time.perf_counter() - log.began
            state = {"settings": settings, "progress": progress, "agent": agent}
            state |= {"generator": generator.get_state().cpu(), "buffer": buffer.state()}
            state |= {"model": model, "synthetic": synthetic.state()}
            log.writer.flush()
            write_checkpoint(run_dir / "checkpoint.pt", state)
        if stop:
            break

    for each in (env, eval_env, log.writer):
        each.close()  # the last video is written now
    if args.track:
        import_module("wandb").finish()
    if not last:
        raise KeyboardInterrupt
    files = ", ".join(sorted(os.listdir(run_dir)))
    print(f"{args.total_timesteps} steps are done; {run_dir} holds {files}")
    return {"evaluations": progress["evaluations"], "agent": agent}


def what_is_saved(args: Args) -> str:
    """Up to which step a run is saved, and how to go on."""
    try:
        step = read_checkpoint(run_folder(args))["progress"]["step"]
    except InputError:
        return "nothing is saved"
    return f"saved up to step {step}, from where --resume goes on"


def main() -> None:
    """Trains as the command line says; bad input is one line on stderr and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # deprecations within libraries
    sys.unraisablehook = lambda *_: None  # what libraries could not close at the end
    whole = re.compile(r"(^|=)(\d+)e(\d)$")  # 1e5 is 100000, also for flags of whole numbers
    words = [whole.sub(lambda x: x[1] + x[2] + "0" * int(x[3]), word) for word in sys.argv[1:]]
    args, interrupted = tyro.cli(Args, description=__doc__, args=words), Event()

    def interrupt(*_) -> None:
        """Ends the run when its episode ends; at once the second time, or if nothing is saved."""
        if interrupted.is_set() or not args.checkpoint_frequency:
            raise KeyboardInterrupt
        interrupted.set()
        print("interrupted: saves when this episode ends; interrupt again to end now", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    code = 1
    try:
        train(args, interrupted)
        return
    except InputError as error:
        code, said = 2, error
    except (FloatingPointError, OSError) as error:
        said = error
    except KeyboardInterrupt:
        said = f"interrupted; {what_is_saved(args)}"
    except Exception:  # of the environment, of the physics
        traceback.print_exc()
        said = f"the run ended early; {what_is_saved(args)}"
    print(f"error: {' '.join(str(said).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
