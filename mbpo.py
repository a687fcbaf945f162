# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<2.14", "gymnasium[mujoco]>=1.1", "mujoco==3.17.0", "tyro>=0.9",
#   "dm_control==1.0.50", "shimmy>=2.0", "numpy>=1.26", "tensorboard>=2.18"]
# ///
"""MBPO, Model-Based Policy Optimization: SAC on transitions that a learned model makes.

MBPO is Janner et al. 2019, "When to Trust Your Model", arXiv 1906.08253. An ensemble of E Gaussian
networks, each on its own bootstrap sample of the real transitions, predicts next state and reward:

    model         p_e(y | s, a) = N(mu_e(x), diag sigma_e^2(x)),   x = (s, a) at unit scale
    loss          sum_e E[(mu_e - y)^2 / sigma_e^2 + log sigma_e^2], mean over dimensions
    target        y = [s' - s, r]
    prediction    s' = s + y[:-1],   r = y[-1],   y ~ p_e, e drawn among the elites
    rollouts      of one step, from random real states, by the policy, fill the synthetic buffer
    SAC           as in sac.py, on batches of 5 % real and 95 % synthetic transitions

Run: python mbpo.py --env-id dmc/walker-run --seed 3
Differs from sac.py in: the ensemble, its rollouts, where batches come from, 20 updates per step.
Sources: MBPO arXiv 1906.08253, SAC 1812.05905, J jannerm/mbpo, S CLeARoboticsLab/STFL (both MBPO).
"""

import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter


# --- Arguments ------------------------------------------------------------------------------------
@dataclass
class Args:
    env_id: str = "dmc/walker-run"  # dmc/<domain>-<task>, a Gymnasium id, or <module>:<id>
    seed: int = 1  # seed of weights, noise and environments
    total_timesteps: int = 500_000  # environment steps (S)
    learning_starts: int = 10_000  # environment steps of uniform random actions, of the total (S)
    updates_per_step: int = 20  # SAC updates per environment step (S; MBPO, table 1, J: by task)
    ensemble_size: int = 7  # networks in the ensemble (MBPO, table 1; J, S)
    num_elites: int = 5  # networks that rollouts draw from, those of least holdout error (J, S)
    model_hidden: int = 200  # units in each of the four hidden layers (MBPO, table 1; J, S)
    model_lr: float = 1e-3  # Adam step size of the ensemble (J; S: 3e-4, slower: README)
    model_train_frequency: int = 250  # environment steps between fits (J, S)
    model_first_updates: int = 10_000  # gradient steps of the first fit (README; S: 5,000)
    model_updates: int = 500  # gradient steps of every later fit (README; S: 5,000)
    model_patience: int | None = None  # if set, fits end after more epochs without 1 % gain (J: 5)
    holdout_ratio: float = 0.2  # share of the real transitions held out, at most 5,000 (J)
    rollouts_per_step: int = 400  # model rollouts per environment step (MBPO, table 1; J, S)
    rollout_schedule: tuple[int, int, int, int] = (0, 1, 1, 1)  # steps START END, horizons FROM TO
    real_ratio: float = 0.05  # share of real transitions in a SAC batch, rounded down (J; S: up)
    never_terminates: bool = False  # the task has no termination (for ids not in HEALTHY)
    batch_size: int = 256  # transitions per SAC update (SAC, table 1; J, S)
    gamma: float = 0.99  # discount factor (SAC, table 1; J, S)
    tau: float = 0.005  # step of the target networks towards the critics (SAC, table 1; J, S)
    policy_lr: float = 3e-4  # Adam step size of the actor (SAC, table 1; J, S)
    q_lr: float = 3e-4  # Adam step size of critics and temperature (SAC, table 1; J, S)
    autotune: bool = True  # learn the temperature (SAC, section 5; J, S)
    alpha: float = 1.0  # temperature to start from (J, S), or to keep with --no-autotune
    target_entropy: float | None = None  # nats; None: -(action dimensions) / 2 (S; SAC: not halved)
    buffer_size: int = 1_000_000  # real transitions kept (SAC, table 1; J, S)
    eval_frequency: int = 5_000  # environment steps between evaluations, 0 for none (S)
    eval_episodes: int = 10  # episodes with deterministic actions per evaluation (S)
    checkpoint_frequency: int = 10_000  # steps between checkpoints, at an episode's end; 0: none
    run_root: str = "runs"  # folder of the run folders (CleanRL)
    exp_name: str = Path(__file__).stem  # middle part of the run folder's name (CleanRL)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda or mps
    compile: bool = True  # compile the updates with torch.compile
    track: bool = False  # log to Weights & Biases, too (CleanRL); WANDB_PROJECT, _ENTITY say where
    capture_video: bool = False  # record the first episode of every evaluation (CleanRL)
    resume: bool = False  # go on from the checkpoint in the run folder


class InputError(ValueError):
    """What was asked for can't be done; one line says why and what to do."""


def check_args(args: Args) -> None:
    """Raises InputError for a value out of its range, and for what this machine lacks."""
    here = ["cpu", *(d for d in ("cuda", "mps") if getattr(torch, d).is_available())]
    counts = "total_timesteps learning_starts updates_per_step batch_size buffer_size eval_episodes"
    counts += " ensemble_size model_hidden model_train_frequency model_first_updates model_updates"
    enough = "1 / --holdout-ratio or more"
    rules = [  # names, what must hold, and how to say it
        (counts, lambda x: isinstance(x, int) and x >= 1, "a whole number, at least 1"),
        ("seed", lambda x: 0 <= x < 2**63, "from 0 to 2^63 - 1"),
        ("eval_frequency checkpoint_frequency", lambda x: x >= 0, "0 or more"),
        ("gamma tau", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("policy_lr q_lr alpha model_lr", lambda x: 0 < x < math.inf, "above 0 and finite"),
        ("device", lambda x: x in here, f"one that is here ({', '.join(here)})"),
        ("total_timesteps", lambda x: x >= args.learning_starts, "at least --learning-starts"),
        ("rollouts_per_step model_patience", lambda x: x is None or x >= 1, "at least 1"),
        ("num_elites", lambda x: 1 <= x <= args.ensemble_size, "from 1 to --ensemble-size"),
        ("holdout_ratio", lambda x: 0 < x < 1, "above 0 and below 1"),
        ("learning_starts buffer_size", lambda x: x >= 1 / args.holdout_ratio, enough),
        ("real_ratio", lambda x: 0 <= x < 1, "at least 0 and below 1"),
        ("batch_size", lambda x: not 0 < args.real_ratio * x < 1, "1 / --real-ratio or more"),
        ("rollout_schedule", lambda x: x[0] < x[1] and min(x[2:]) > 0, "START < END, FROM, TO > 0"),
    ]
    for names, holds, wanted in rules:
        for name in names.split():
            if not holds(value := getattr(args, name)):
                raise InputError(f"--{name.replace('_', '-')} must be {wanted}, not {value!r}")
    if args.capture_video and not util.find_spec("moviepy"):
        raise InputError("--capture-video needs moviepy: pip install moviepy")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise InputError("--compile needs a C++ compiler: install g++, or give --no-compile")


# --- Environment ----------------------------------------------------------------------------------
def make_env(env_id: str, render: bool = False) -> gym.Env:
    """The task with observations [S], actions in [-1, 1]^A; InputError if it can't be trained."""
    module, _, name = env_id.rpartition(":")  # <module>:<id> names the module that registers it
    kwargs = {"render_mode": "rgb_array"} if render else {}
    hidden = {"Ant-v5": "cfrc_ext", "Humanoid-v5": "cinert cvel qfrc_actuator cfrc_ext"}  # as in J
    kwargs |= {f"include_{part}_in_observation": False for part in hidden.get(env_id, "").split()}
    if name.startswith("dmc/"):
        name, kwargs["render_kwargs"] = f"dm_control/{name[4:]}-v0", {"camera_id": 0}
    try:
        with warnings.catch_warnings(action="ignore"):  # libraries' words about libraries
            import_module("shimmy")  # registers the suite as dm_control/<domain>-<task>-v0
            if module:
                import_module(module)
            if name not in gym.registry:
                suite = import_module("dm_control.suite").ALL_TASKS
                known = [*gym.registry, *(f"dmc/{domain}-{task}" for domain, task in suite)]
                near = difflib.get_close_matches(env_id, known) or ["dmc/walker-run"]
                raise InputError(f"no such task; did you mean {' or '.join(near)}?")
            limit = gym.spec(name).max_episode_steps or 1000  # the suite's own limit is 1,000, too
            env = gym.make(name, max_episode_steps=limit, disable_env_checker=True, **kwargs)
            if isinstance(env.observation_space, gym.spaces.Dict):
                env = gym.wrappers.FlattenObservation(env)
            actions, states = env.action_space, env.observation_space
            boxes = isinstance(actions, gym.spaces.Box) and isinstance(states, gym.spaces.Box)
            if not (boxes and actions.high.max() < 1e9 and len(states.shape) == 1):
                raise InputError(f"needs bounded Box actions, Box vectors; not {actions}, {states}")
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
            _, _ = env.reset(seed=0)  # a fault is better found now than in the run
            _, _, _, _, _ = env.step(np.zeros(actions.shape, np.float32))
            if render:
                env.render()
    except Exception as error:  # of the registry, of the environment, of the renderer
        reason = (str(error).strip(" .\n") or repr(error)).splitlines()[0]
        reason += "; try MUJOCO_GL=egl, or apt install libegl1" if "GL" in reason else ""
        raise InputError(f"--env-id {env_id}: {reason}") from None
    return env


def derive_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, such as (seed, stream, episode)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_finite(step: int, **quantities) -> None:
    """Raises FloatingPointError, naming quantity and step, for a number that is not finite."""
    for name, value in quantities.items():
        if not torch.as_tensor(value).isfinite().all():
            raise FloatingPointError(f"{name} is not finite at step {step}: the run stops")


HEALTHY = {  # Gymnasium's v5 conditions to go on, of s [S, ...], a [A, ...], s' = n [S, ...]
    "Hopper": lambda s, a, n: (n[0] > 0.7) & (n[1].abs() < 0.2) & (n[1:].abs() < 100).all(0),
    "Walker2d": lambda s, a, n: (n[0] > 0.8) & (n[0] < 2) & (n[1].abs() < 1),
    "Ant": lambda s, a, n: (n[0] >= 0.2) & (n[0] <= 1) & n.isfinite().all(0),
    "Humanoid": lambda s, a, n: (n[0] > 1) & (n[0] < 2),
    "InvertedPendulum": lambda s, a, n: (n[1].abs() <= 0.2) & n.isfinite().all(0),
    **dict.fromkeys(["HalfCheetah", "Swimmer", "Reacher", "Pusher"]),  # these never end
}


def termination_function(args: Args):
    """The task's function (s, a, s') [..., n] -> terminated [...]; InputError if it has none."""
    task = args.env_id.rpartition(":")[2].split("-v")[0]
    never = args.never_terminates or task.startswith("dmc/")  # the suite's tasks never do
    if not never and task not in HEALTHY:
        raise InputError(f"{task} is not in this file's HEALTHY: add it or give --never-terminates")
    if never or HEALTHY[task] is None:
        return lambda s, a, s_next: torch.zeros_like(s_next[..., 0], dtype=torch.bool)
    return lambda *states: ~HEALTHY[task](*(x.movedim(-1, 0) for x in states))


def check_termination(terminates, args: Args, step: int, obs, action, next_obs, terminated) -> None:
    """Raises InputError if a real transition, in its own float64, ends unlike `terminates` says."""
    if terminated != bool(terminates(*map(torch.as_tensor, (obs, action, next_obs)))):
        raise InputError(f"step {step} has {terminated=}: HEALTHY or --never-terminates is wrong")


# --- Replay ---------------------------------------------------------------------------------------
class Batch(NamedTuple):  # transitions; S, A: numbers in a state, an action; ...: any batch shape
    obs: Tensor  # [..., S]
    action: Tensor  # [..., A], in [-1, 1]
    reward: Tensor  # [...]
    next_obs: Tensor  # [..., S]
    terminated: Tensor  # [...], 1 where the task ended the episode, 0 at a time limit


class ReplayBuffer:
    """Ring of the last `capacity` transitions, one row each; InputError if memory is too small."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.parts = [obs_dim, action_dim, 1, obs_dim, 1]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else memory
        if (size := 4 * capacity * sum(self.parts)) > memory:
            raise InputError(f"the replay buffers need {size >> 30} GiB, {memory >> 30} GiB exist")
        self.rows = torch.empty(capacity, sum(self.parts), device=device)  # [capacity, 2S + A + 2]
        self.added = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """Adds rows [N, 2S + A + 2], over the oldest ones once the ring is full."""
        index = torch.arange(self.added, self.added + len(rows), device=rows.device)
        self.rows[index % len(self.rows)] = rows
        self.added += len(rows)

    def sample(self, *shape: int, draw: dict) -> Tensor:
        """Rows [*shape, 2S + A + 2], drawn uniformly; `draw`: keywords generator, device."""
        return F.embedding(torch.randint(len(self), shape, **draw), self.rows)  # fast indexing

    def unpack(self, rows: Tensor) -> Batch:
        """The parts of rows [..., 2S + A + 2]."""
        obs, action, reward, next_obs, terminated = rows.split(self.parts, -1)
        return Batch(obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1))


# --- Networks -------------------------------------------------------------------------------------
def mlp(in_dim: int, out_dim: int, hidden: int = 256) -> nn.Sequential:
    """Two hidden ReLU layers (SAC, table 1), orthogonal, gain sqrt 2 (S; log std: 1), zero bias."""
    layers = [nn.Linear(in_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_dim)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


class Critic(nn.Module):
    """Twin action values [2, B] of s [B, S] and a [B, A], from two networks in one."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        twins = [mlp(obs_dim + action_dim, 1) for _ in range(2)]
        stacked = [*stack_module_state(twins)[0].values()]  # weight, bias, weight, bias, ...
        self.weights = nn.ParameterList(w.mT.contiguous() for w in stacked[::2])  # [2, in, out]
        self.biases = nn.ParameterList(b[:, None] for b in stacked[1::2])  # [2, 1, out]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (F.relu(x) if i else x) @ weight + bias
        return x.squeeze(-1)


def sample_action(nets: dict, params: dict, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(u), u = mean + std noise [..., A], and log pi(a | s) [...] (SAC, eq. 26)."""
    mean, log_std = functional_call(nets["actor"], params, (obs,)).chunk(2, -1)
    log_std = -10 + 6 * (1 + torch.tanh(log_std))  # in [-10, 2] (S)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2)
    return torch.tanh(u), (log_normal - log_jacobian).sum(-1)


def adam_init(net: nn.Module, device: torch.device) -> dict:
    """What Adam learns: parameters by name, their gradients' first and second moments, steps.

    Adam is written out as a pure function, so that torch.compile makes an update one graph.
    """
    params = {name: param.detach().clone().to(device) for name, param in net.named_parameters()}
    m, v = tree_map(torch.zeros_like, params), tree_map(torch.zeros_like, params)
    return {"params": params, "m": m, "v": v, "t": torch.zeros((), device=device)}


def adam_step(learner: dict, grads: dict, lr: float) -> dict:
    """The learner after one step (Kingma & Ba 2015, algorithm 1, with its default constants)."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    t = learner["t"] + 1
    m = {name: beta1 * learner["m"][name] + (1 - beta1) * g for name, g in grads.items()}
    v = {name: beta2 * learner["v"][name] + (1 - beta2) * g**2 for name, g in grads.items()}
    m_scale, v_scale = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
    change = {name: lr * m[name] * m_scale / ((v[name] * v_scale).sqrt() + eps) for name in grads}
    params = {name: param - change[name] for name, param in learner["params"].items()}
    return {"params": params, "m": m, "v": v, "t": t}


def in_place(function, state: dict, *inputs, **settings) -> dict:
    """Writes the new state of function(state, *inputs) -> (state, metrics) over the old one."""
    new, metrics = function(state, *inputs, **settings)
    tree_map(Tensor.copy_, state, new)
    return metrics


# --- Model ----------------------------------------------------------------------------------------
class Ensemble(nn.Module):
    """E networks in one: mean and log variance [E, B, S + 1] given x [E, B, S + A] or [B, S + A].

    Four hidden SiLU layers; truncated normal init with std 1 / (2 sqrt(fan in)), zero bias (J). The
    log variance is softly clamped between learned bounds (PETS, Chua et al. 2018, appendix A.1).
    """

    def __init__(self, size: int, in_dim: int, out_dim: int, hidden: int):
        super().__init__()
        widths = [in_dim, hidden, hidden, hidden, hidden, 2 * out_dim]
        weights = [torch.empty(size, widths[i], widths[i + 1]) for i in range(5)]
        for weight in weights:
            std = 1 / (2 * math.sqrt(weight.shape[1]))
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        self.weights = nn.ParameterList(weights)  # [E, in, out] each
        self.biases = nn.ParameterList(torch.zeros(size, 1, width) for width in widths[1:])
        self.max_log_var = nn.Parameter(torch.full((out_dim,), 0.5))  # start of both bounds: J
        self.min_log_var = nn.Parameter(torch.full((out_dim,), -10.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (F.silu(x) if i else x) @ weight + bias
        mean, log_var = x.chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)


def fit_scaler(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [n] of rows [N, n]; a dimension that is constant gets 1 (J)."""
    std, mean = torch.std_mean(x, 0, correction=0)
    constant = (x.amax(0) == x.amin(0)) | (std < 1e-12)  # rounding leaves a constant some std
    return mean, torch.where(constant, 1.0, std)


def normalize(x: Tensor, scaler: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., n] at zero mean and unit standard deviation."""
    mean, std = scaler
    return (x - mean) / std


def model_targets(data: Batch) -> Tensor:
    """What the ensemble learns, [N, S + 1]: s' - s and r."""
    return torch.cat([data.next_obs - data.obs, data.reward[:, None]], -1)


def model_update(learner: dict, x: Tensor, y: Tensor, net: Ensemble, args: Args) -> tuple:
    """One step on inputs x [E, B, S + A], targets y [E, B, S + 1]; returns the learner, the loss.

    A pure function. loss = sum_e mean[(mu - y)^2 / sigma^2 + log sigma^2]
    + 0.01 sum(max - min log variance) + sum_l decay_l |W_l|^2 / 2 (J).
    """

    def loss_of(params):
        mean, log_var = functional_call(net, params, (x,))
        nll = ((mean - y) ** 2 * torch.exp(-log_var) + log_var).mean((1, 2)).sum()
        spread = (params["max_log_var"] - params["min_log_var"]).sum()
        rates = enumerate((2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4))  # of the five layers (J)
        decay = sum(rate / 2 * (params[f"weights.{i}"] ** 2).sum() for i, rate in rates)
        return nll + 0.01 * spread + decay

    grads, loss = grad_and_value(loss_of)(learner["params"])
    return adam_step(learner, grads, args.model_lr), loss


def fit_ensemble(learner: dict, data: Batch, updates: int, update, net, args, draw: dict) -> tuple:
    """Fits the ensemble further to N real transitions; returns the model and the fit's metrics.

    Weights and Adam's moments carry over; split, scalers and bootstrap samples are drawn anew. Each
    member takes `updates` steps and keeps its last weights (S), or stops early (`stop_early`, J).
    Elites are those of least error on the holdout, most of which earlier fits have trained on (J).
    """
    order = torch.randperm(len(data.reward), **draw)
    held_out = min(int(args.holdout_ratio * len(order)), 5000)  # J
    holdout, train = order[:held_out], order[held_out:]
    inputs = torch.cat([data.obs, data.action], -1)
    targets = model_targets(data)
    change = (data.next_obs - data.obs)[holdout]
    inflation = fit_scaler(targets[holdout])[1][:-1] / fit_scaler(change)[1]  # [S]
    scaler = {"inputs": fit_scaler(inputs[train])}
    inputs = normalize(inputs, scaler["inputs"])
    bootstrap = train[torch.randint(len(train), (args.ensemble_size, len(train)), **draw)]

    def learn() -> Tensor:
        """One gradient step of every member, on 256 rows (J) of its sample; returns the loss."""
        chosen = torch.randint(len(train), (args.ensemble_size, 256), **draw)
        rows = bootstrap.gather(1, chosen)  # [E, 256]
        return update(learner, F.embedding(rows, inputs), F.embedding(rows, targets))

    def holdout_error() -> Tensor:
        """Mean squared error of every member [E]."""
        mean, _ = functional_call(net, learner["params"], (inputs[holdout],))
        return ((mean - targets[holdout]) ** 2).mean((1, 2))

    if args.model_patience is None:
        for _ in range(updates):
            loss = learn()
    else:
        epoch = math.ceil(len(train) / 256)  # gradient steps; their rows are drawn with replacement
        loss, updates = stop_early(learner, learn, holdout_error, epoch, args.model_patience)

    error = holdout_error()
    elites = error.argsort()[: args.num_elites]
    metrics = {"loss": loss, "updates": updates, "holdout_mse": error[elites].mean()}
    mean, log_var = functional_call(net, learner["params"], (inputs[holdout],))  # [E, H, S + 1]
    metrics |= model_metrics(mean[elites], log_var[elites], targets[holdout], inflation)
    return {"learner": learner, "scaler": scaler, "elites": elites}, metrics


def stop_early(learner: dict, learn, holdout_error, epoch: int, patience: int) -> tuple:
    """Learns until more than `patience` epochs in a row improve no member's error by 1 % (J).

    Each member then goes back to its weights after its own last 1 % gain, but not the bounds, nor
    Adam's moments. Returns the last loss and the gradient steps kept, the mean over members.
    """
    weights = {name: p for name, p in learner["params"].items() if "log_var" not in name}
    best = {name: p.clone() for name, p in weights.items()}
    best_error = torch.full_like(weights["weights.0"][:, 0, 0], math.inf)  # [E]
    kept = torch.zeros_like(best_error)
    done, stale = 0, 0
    while stale <= patience:
        for _ in range(epoch):
            loss = learn()
        done += epoch
        error = holdout_error()
        improved = error < 0.99 * best_error
        best_error[improved], kept[improved] = error[improved], done
        for name, p in weights.items():
            best[name][improved] = p[improved]
        stale = 0 if improved.any() else stale + 1
    for name, p in weights.items():
        p.copy_(best[name])
    return loss, kept.mean()


def model_metrics(mean: Tensor, log_var: Tensor, targets: Tensor, inflation: Tensor) -> dict:
    """How K elites' mean and log variance [K, H, S + 1] fit held-out targets y [H, S + 1].

    reward_error, state_error   E[(mu - y)^2] / Var[y], of the network's own targets
    change_error                E[(mu - y)^2 + sigma^2], what rollouts draw, but in units of
                                Var[s' - s]: at 1, no better than s plus the mean change;
                                `inflation` [S] is Std[y] / Std[s' - s] before any scaling
    reward_share_of_loss        the reward's part of sum_i E[(mu_i - y_i)^2 / sigma_i^2] (FTFL)
    reward_std_ratio            E[sigma] / Std[y] of the reward (FTFL)
    """
    squared, std = (mean - targets) ** 2, fit_scaler(targets)[1]
    error = squared.mean((0, 1)) / std**2  # [S + 1]
    sampled = error + log_var.exp().mean((0, 1)) / std**2
    weighted = (squared / log_var.exp()).mean((0, 1))
    return {
        "reward_error": error[-1],
        "state_error_mean": error[:-1].mean(),
        "state_error_worst": error[:-1].max(),
        "change_error_mean": (sampled[:-1] * inflation**2).mean(),
        "change_error_worst": (sampled[:-1] * inflation**2).max(),
        "reward_share_of_loss": weighted[-1] / weighted.sum(),
        "reward_std_ratio": (log_var[..., -1] / 2).exp().mean() / std[-1],
    }


def rollout_horizon(step: int, schedule: tuple[int, int, int, int]) -> int:
    """Steps of a model rollout, a whole number on the line of --rollout-schedule (J)."""
    start, end, low, high = schedule
    return low + (min(max(step, start), end) - start) * (high - low) // (end - start)


def model_step(model: dict, actor: dict, obs: Tensor, choice: Tensor, noise, nets, args) -> tuple:
    """a [B, A], s' [B, S] and r [B] after s [B, S], all sampled: a pure function.

    Branch b follows elite `choice[b]`; noise is that of the action [B, A], the model's [B, S + 1].
    """
    action, _ = sample_action(nets, actor, obs, noise[0])
    inputs = normalize(torch.cat([obs, action], -1), model["scaler"]["inputs"])
    params = model["learner"]["params"]
    elites = {name: p if "log_var" in name else p[model["elites"]] for name, p in params.items()}
    mean, log_var = functional_call(nets["ensemble"], elites, (inputs,))  # [K, B, S + 1], K elites
    branch = torch.arange(len(obs), device=obs.device)
    y = mean[choice, branch] + (log_var[choice, branch] / 2).exp() * noise[1]
    next_obs = obs + y[:, :-1]
    reward = y[:, -1]
    return action, next_obs, reward


def rollout(model, actor, starts: Batch, horizon, step_model, terminates, draw: dict) -> Tensor:
    """Rows of up to `horizon` steps from each of B states; every step draws its elite and noise."""
    obs, alive = starts.obs, torch.ones_like(starts.reward, dtype=torch.bool)
    rows, reached = [], []  # of every step: [B, 2S + A + 2], and whether a branch got there [B]
    for _ in range(horizon):
        choice = torch.randint(len(model["elites"]), alive.shape, **draw)
        model_noise = torch.randn(len(obs), obs.shape[1] + 1, **draw)
        noise = (torch.randn(starts.action.shape, **draw), model_noise)
        action, next_obs, reward = step_model(model, actor, obs, choice, noise)
        terminated = terminates(obs, action, next_obs)
        rows.append(torch.cat([obs, action, reward[:, None], next_obs, terminated[:, None]], -1))
        reached.append(alive)
        obs, alive = next_obs, alive & ~terminated
    return torch.cat(rows)[torch.cat(reached)] if horizon > 1 else rows[0]  # all were reached


def resized(buffer: ReplayBuffer, capacity: int) -> ReplayBuffer:
    """A ring of another capacity with the newest of the buffer's transitions, in order of age."""
    new = ReplayBuffer(capacity, *buffer.parts[:2], buffer.rows.device)
    ages = torch.arange(buffer.added - len(buffer), buffer.added, device=buffer.rows.device)
    new.add(buffer.rows[ages[-capacity:] % len(buffer.rows)])
    return new


# --- SAC ------------------------------------------------------------------------------------------
def sac_init(nets: dict, alpha: float, device: torch.device) -> dict:
    """All that a SAC update changes."""
    nets = nets | {"temperature": nn.ParameterDict({"log_alpha": torch.tensor(math.log(alpha))})}
    agent = {name: adam_init(net, device) for name, net in nets.items()}
    return agent | {"target": {name: p.clone() for name, p in agent["critic"]["params"].items()}}


def sac_update(agent: dict, batch: Batch, noise: Tensor, nets: dict, args: Args) -> tuple:
    """One update on B transitions with noise [2, B, A]; returns the new agent and its metrics.

    A pure function. Order: critics, targets, the actor against the new critics, temperature (S).
    """
    alpha = agent["temperature"]["params"]["log_alpha"].exp()
    old_actor = agent["actor"]["params"]
    next_action, next_log_prob = sample_action(nets, old_actor, batch.next_obs, noise[0])
    next_q = functional_call(nets["critic"], agent["target"], (batch.next_obs, next_action)).amin(0)
    y = batch.reward + args.gamma * (1 - batch.terminated) * (next_q - alpha * next_log_prob)  # [B]

    def critic_loss(params):
        q = functional_call(nets["critic"], params, (batch.obs, batch.action))  # [2, B]
        return ((q - y) ** 2).mean(1).sum(), q.mean()

    grads, (q_loss, q) = grad_and_value(critic_loss, has_aux=True)(agent["critic"]["params"])
    critic = adam_step(agent["critic"], grads, args.q_lr)
    new = critic["params"]
    target = {name: torch.lerp(old, new[name], args.tau) for name, old in agent["target"].items()}

    def actor_loss(params):
        action, log_prob = sample_action(nets, params, batch.obs, noise[1])
        q = functional_call(nets["critic"], new, (batch.obs, action)).amin(0)  # [B]
        return (alpha * log_prob - q).mean(), -log_prob.mean()

    grads, (pi_loss, entropy) = grad_and_value(actor_loss, has_aux=True)(old_actor)
    actor = adam_step(agent["actor"], grads, args.policy_lr)
    temperature = agent["temperature"]
    if args.autotune:  # J(alpha) is its own gradient by log(alpha)
        goal = -batch.action.shape[-1] / 2 if args.target_entropy is None else args.target_entropy
        grads = {"log_alpha": alpha * (entropy - goal)}
        temperature = adam_step(temperature, grads, args.q_lr)
    metrics = {"q_loss": q_loss, "q": q, "actor_loss": pi_loss, "entropy": entropy, "alpha": alpha}
    return {"actor": actor, "critic": critic, "temperature": temperature, "target": target}, metrics


def critic_bias(agent: dict, nets: dict, gamma: float, episode: Batch, noise: Tensor) -> float:
    """Mean over an episode's T steps of min_i Q_i(s_t, a_t) - G_t; noise [T + 1, A].

    G_t = r_t + gamma V_{t+1}, V_t = G_t - alpha log pi(a'_t | s_t), a'_t sampled, a_t the mean's.
    V_T is 0 after a termination; at a time limit min_i Q_i(s_T, a'_T) stands in for G_T.
    """
    obs = torch.cat([episode.obs, episode.next_obs[-1:]])  # [T + 1, S]
    critic = partial(functional_call, nets["critic"], agent["critic"]["params"])
    action, log_prob = sample_action(nets, agent["actor"]["params"], obs, noise)
    value = -agent["temperature"]["params"]["log_alpha"].exp() * log_prob  # [T + 1], bonus alone
    value[-1] = (1 - episode.terminated[-1]) * (value[-1] + critic((obs[-1:], action[-1:])).amin())
    bias = critic((episode.obs, episode.action)).amin(0)  # [T]
    for t in reversed(range(len(bias))):
        soft_return = episode.reward[t] + gamma * value[t + 1]  # G_t
        bias[t] -= soft_return
        value[t] += soft_return
    return float(bias.mean())


def evaluate(env: gym.Env, agent: dict, nets: dict, args: Args, step: int, unpack) -> tuple:
    """Returns of deterministic episodes, the bias. Training's random numbers stay as they are."""
    actor, device = agent["actor"]["params"], agent["actor"]["t"].device
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, 1, step))
    returns, biases = [], []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=derive_seed(args.seed, 1, step, episode))
        rows, over = [], False
        while not over:
            x = torch.as_tensor(obs, dtype=torch.float32, device=device)
            action = sample_action(nets, actor, x, noise=0.0)[0].cpu().numpy()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(np.concatenate([obs, action, [reward], next_obs, [terminated]]))
            obs, over = next_obs, terminated or truncated
        transitions = unpack(torch.as_tensor(np.array(rows), dtype=torch.float32, device=device))
        noise = torch.randn(len(rows) + 1, len(action), generator=generator, device=device)
        biases.append(critic_bias(agent, nets, args.gamma, transitions, noise))
        returns.append(sum(transitions.reward.tolist()))
    return returns, np.mean(biases)


# --- Run folder -----------------------------------------------------------------------------------
def write_checkpoint(file: Path, state: dict) -> None:
    """Replaces the file in one step; if the disk is full, OSError, and it stays as it was."""
    temporary = file.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from None


def run_folder(args: Args) -> Path:
    """<run root>/<env id>__<experiment>__<seed>."""
    task = args.env_id.replace("/", "-").replace(":", "-")
    return Path(args.run_root, f"{task}__{args.exp_name}__{args.seed}")


def read_run(args: Args, device: torch.device) -> tuple[dict, dict | None]:
    """The run's settings, and the checkpoint that it goes on from, or None; writes nothing.

    Raises InputError if the folder holds another run, or one that was not to be resumed.
    """
    run_dir, saved = run_folder(args), None
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    settings = {"script": Path(__file__).name, "source": source} | asdict(args)
    free = "source resume run_root total_timesteps checkpoint_frequency device track capture_video"
    file = run_dir / "checkpoint.pt"
    if args.resume and file.is_file():
        try:
            saved = torch.load(file, map_location=device)
            held, done = saved["settings"], saved["progress"][0]
        except Exception:  # torch.load has no error of its own
            raise InputError(f"{file} is damaged: remove {run_dir} to start anew") from None
        for name in sorted(settings.keys() - {*free.split()}):
            if (was := held.get(name, "unknown to an older script")) != settings[name]:
                change = f"{name} {was}, not {settings[name]}: choose another --exp-name"
                raise InputError(f"{run_dir} holds a run with {change}")
        if done > args.total_timesteps:
            raise InputError(f"{run_dir} has {done} steps: --total-timesteps must not be less")
    elif run_dir.is_dir() and any(run_dir.iterdir()) and not args.resume:
        raise InputError(f"{run_dir} holds a run: go on with --resume, remove it, or --exp-name")
    return settings, saved


def open_run(args: Args, settings: dict) -> Path:
    """The run's folder, with args.json in it; if W&B fails, InputError, and nothing is written."""
    run_dir = run_folder(args)
    if args.track:
        try:
            names = {"id": run_dir.name, "resume": "allow", "config": settings}
            import_module("wandb").init(**names, sync_tensorboard=True)
        except Exception as error:  # of the network, of the account, of the settings
            remedy = "pip install wandb, then `wandb login` or WANDB_MODE=offline"
            raise InputError(f"--track: {error} ({remedy})") from None
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    return run_dir


# --- Training -------------------------------------------------------------------------------------
def setup_torch(args: Args, device: torch.device):
    """torch.compile as the updates use it; sets how products of float32 are computed."""
    torch.compiler.reset()  # or the graphs of several runs in one process count against a limit
    torch.set_float32_matmul_precision("medium")  # so an AMD CPU uses oneDNN, much faster than MKL
    probe = torch.full((256, 256), 1 + 2**-12, device=device)  # TF32 and bfloat16 round it to 1
    if (probe @ probe).amin() < 256.1:  # such products are not exact
        torch.set_float32_matmul_precision("highest")
    return partial(torch.compile, fullgraph=True, dynamic=False, disable=not args.compile)


def train(args: Args) -> dict:
    """Trains; returns eval.csv's lines and the agent. Bad input is refused before any file."""
    check_args(args)
    device = torch.device(args.device)
    env, eval_env = make_env(args.env_id), make_env(args.env_id, args.capture_video)
    dims = env.observation_space.shape[0], env.action_space.shape[0]  # S, A
    terminates = termination_function(args)
    per_horizon = 1000 * args.rollouts_per_step  # synthetic rows kept, per step of the horizon (J)
    most = args.buffer_size + per_horizon * max(args.rollout_schedule[2:])
    ReplayBuffer(most, *dims, device)  # raises now if both buffers will not fit at their largest
    buffer = ReplayBuffer(args.buffer_size, *dims, device)
    settings, saved = read_run(args, device)
    torch.manual_seed(derive_seed(args.seed, 2))  # for the initial weights alone
    draw = {"generator": torch.Generator(device).manual_seed(args.seed), "device": device}
    nets = {"actor": mlp(dims[0], 2 * dims[1]), "critic": Critic(*dims)}
    agent = sac_init(nets, args.alpha, device)
    nets["ensemble"] = Ensemble(args.ensemble_size, sum(dims), dims[0] + 1, args.model_hidden)
    model = {"learner": adam_init(nets["ensemble"], device)}
    progress = 0, 0, 0.0, ["step,mean,std,min,max,episodes,seconds"]
    start, episode, seconds, evaluations = saved["progress"] if saved else progress
    horizon = rollout_horizon(start, args.rollout_schedule)
    synthetic = ReplayBuffer(per_horizon * horizon, *dims, device)
    if saved:
        if tree_map(Tensor.size, saved["agent"]) != tree_map(Tensor.size, agent):
            raise InputError(f"{run_folder(args)} holds a run of another version of this script")
        agent = saved["agent"]
        if len(saved["generator"]) == len(draw["generator"].get_state()):  # of such a device
            draw["generator"].set_state(saved["generator"].cpu())
        buffer.add(saved["rows"])
        buffer.added = saved["added"]
        model = saved["model"]
        synthetic.add(saved["synthetic"])
        synthetic.added = saved["synthetic_added"]
    run_dir = open_run(args, settings)
    print(f"{run_dir} on {device}, from step {start}", flush=True)

    jit = setup_torch(args, device)
    update = jit(partial(in_place, sac_update, nets=nets, args=args), mode="reduce-overhead")
    update_model = partial(in_place, model_update, net=nets["ensemble"], args=args)
    update_model = jit(update_model, mode="reduce-overhead")  # replayed as a CUDA graph on a GPU
    step_model = jit(partial(model_step, nets=nets, args=args))
    tree_map(torch._dynamo.mark_static_address, (agent, model))  # CUDA graphs write there
    if args.capture_video:
        folder = str(run_dir / "videos")
        eval_env = gym.wrappers.RecordVideo(eval_env, folder, lambda n: n % args.eval_episodes == 0)
    writer = SummaryWriter(run_dir, purge_step=start + 1 if saved else 0)
    writer.add_text("hyperparameters", f"```\n{json.dumps(settings, indent=2)}\n```", start)
    step, checkpointed, over, metrics = start, start, True, {}
    began, learned = time.perf_counter() - seconds, None  # speed: from the first updates on

    for step in range(start + 1 if saved else 0, args.total_timesteps + 1):
        if step > 0:  # step 0 only evaluates
            if over:  # each is seeded, so that a run can be taken up at an episode's start
                obs, _ = env.reset(seed=derive_seed(args.seed, 0, episode))
                episode, episode_return, length = episode + 1, 0.0, 0
            if step <= args.learning_starts:
                action = 2 * torch.rand(dims[1], **draw) - 1
            else:
                x = torch.as_tensor(obs, dtype=torch.float32).to(device, non_blocking=True)
                noise = torch.randn(dims[1], **draw)
                action, _ = sample_action(nets, agent["actor"]["params"], x, noise)
            action = action.cpu().numpy()  # waits for the device, until all updates are done
            check_finite(step, **metrics, action=action)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            check_finite(step, observation=next_obs, reward=reward)
            check_termination(terminates, args, step, obs, action, next_obs, terminated)
            row = np.concatenate([obs, action, [reward], next_obs, [terminated]])[None]
            buffer.add(torch.as_tensor(row, dtype=torch.float32).to(device, non_blocking=True))
            obs, over = next_obs, terminated or truncated
            episode_return, length = episode_return + reward, length + 1
            if over:
                writer.add_scalar("train/episode_return", episode_return, step)
                writer.add_scalar("train/episode_length", length, step)

        if step >= args.learning_starts:
            if learned is None:
                print(f"step {step}: compiling the updates, fitting the model", flush=True)
            if (step - args.learning_starts) % args.model_train_frequency == 0:
                n = args.model_updates if step > args.learning_starts else args.model_first_updates
                data, net = buffer.unpack(buffer.rows[: len(buffer)]), nets["ensemble"]
                model, fit = fit_ensemble(model["learner"], data, n, update_model, net, args, draw)
                for name, value in fit.items():
                    writer.add_scalar(f"model/{name}", value, step)
            horizon = rollout_horizon(step, args.rollout_schedule)
            if horizon * per_horizon != len(synthetic.rows):
                synthetic = resized(synthetic, horizon * per_horizon)
            starts = buffer.unpack(buffer.sample(args.rollouts_per_step, draw=draw))
            actor = agent["actor"]["params"]
            synthetic.add(rollout(model, actor, starts, horizon, step_model, terminates, draw))
            real = int(args.real_ratio * args.batch_size)
            sizes = [(buffer, real), (synthetic, args.batch_size - real)]
            rows = torch.cat([x.sample(args.updates_per_step, n, draw=draw) for x, n in sizes], 1)
            noise = torch.randn(args.updates_per_step, 2, args.batch_size, dims[1], **draw)
            for i in range(args.updates_per_step):
                metrics = update(agent, buffer.unpack(rows[i]), noise[i])
            if learned is None:
                learned = step, time.perf_counter()
            if step % 1000 == 0:
                for name, value in metrics.items():
                    writer.add_scalar(f"sac/{name}", value, step)

        text = ""
        if args.eval_frequency and step % args.eval_frequency == 0:
            eval_env.name_prefix = f"step-{step}"  # of a video
            returns, bias = evaluate(eval_env, agent, nets, args, step, buffer.unpack)
            seconds = time.perf_counter() - began
            numbers = [*(f(returns) for f in (np.mean, np.std, min, max, len)), seconds]
            evaluations.append(f"{step}," + ",".join(f"{x:.6g}" for x in numbers))
            (run_dir / "eval.csv").write_text("\n".join([*evaluations, ""]))
            writer.add_scalar("eval/return", numbers[0], step)
            writer.add_scalar("eval/critic_bias", bias, step)
            text = f"  return {numbers[0]:8.2f} +- {numbers[1]:.2f}"
        if learned and step > learned[0] and (text or step % 1000 == 0):
            rate = (step - learned[0]) / (time.perf_counter() - learned[1])
            left = timedelta(seconds=round((args.total_timesteps - step) / rate))
            text += f"  {rate:,.1f} steps/s, {left} left"
            writer.add_scalar("train/steps_per_second", rate, step)
        if text:
            print(f"step {step:7d}{text}", flush=True)

        last, every = step == args.total_timesteps, args.checkpoint_frequency
        if every and (last or (over and step // every > checkpointed // every)):
            writer.flush()
            check_finite(step, **metrics, **agent["actor"]["params"], **agent["critic"]["params"])
            checkpointed, seconds = step, time.perf_counter() - began
            state = {"settings": settings, "generator": draw["generator"].get_state()}
            state |= {"progress": (step, episode, seconds, evaluations), "added": buffer.added}
            state |= {"agent": agent, "rows": buffer.rows[: len(buffer)].clone()}
            filled = synthetic.rows[: len(synthetic)].clone()
            state |= {"model": model, "synthetic": filled, "synthetic_added": synthetic.added}
            write_checkpoint(run_dir / "checkpoint.pt", state)
    writer.close()
    print(f"{step} steps are done; {run_dir} holds {', '.join(sorted(os.listdir(run_dir)))}")
    return {"evaluations": evaluations, "agent": agent}


def main() -> None:
    """Trains as the command line says; bad input is one line on stderr and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    sys.unraisablehook = lambda *_: None  # and about what they could not close
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    args = tyro.cli(Args, description=__doc__)
    try:
        train(args)
    except (InputError, FloatingPointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        file = run_folder(args) / "checkpoint.pt"
        step = torch.load(file, mmap=True)["progress"][0] if file.is_file() else 0
        sys.exit(f"error: interrupted; saved up to step {step}, from where --resume goes on")


if __name__ == "__main__":
    main()
