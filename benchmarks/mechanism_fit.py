"""What mechanism.py measures, and how: transitions, baselines, targets, one network's fit to them.

python benchmarks/mechanism.py --help      has the equations
"""

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from common import InputError, load_script, load_task
from torch import Tensor
from torch.func import functional_call

mbrl = load_script("mbpo_residual_ablation.py")
CELLS = ["raw residual", "raw direct", "normalized residual", "normalized direct"]
CELLS += ["normalized per-dimension", "normalized ridge"]
RIDGE = 1e-3  # penalty of ridge regression on inputs at unit scale, against a sum over transitions
DATA_SEED = 0  # of the transitions, which all seeds of fits share


class Run(NamedTuple):
    """What a checkpoint of any script has of its run."""

    task: str
    steps: int  # environment steps trained
    actor: dict  # parameters by name
    rows: Tensor  # [N, 2S + A + 2], the replay buffer: s, a, r, s', terminated


def load_run(folder: Path) -> Run:
    """The run whose checkpoint lies in the folder; InputError if there is none."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True)
        actor = {name: param.clone() for name, param in saved["agent"]["actor"]["params"].items()}
        task, steps = saved["settings"]["env_id"], saved["progress"][0]
        return Run(task, steps, actor, saved["rows"].flatten(1))
    except Exception as error:  # torch.load has no error of its own
        said = "there is no checkpoint.pt in it"
        said = said if isinstance(error, OSError) else "its checkpoint.pt is damaged"
        raise InputError(f"{folder}: {said}") from None


def read_buffer(folder: Path, transitions: int) -> tuple[Tensor, Tensor]:
    """x and y as of `collect`, of the first so many rows of the run's buffer."""
    run = load_run(folder)
    if len(run.rows) < transitions:
        held = f"its buffer holds {len(run.rows)} transitions"
        raise InputError(f"{folder}: {held}, fewer than the {transitions} to fit")
    states, actions = run.actor["0.weight"].shape[1], len(run.actor["4.bias"]) // 2
    rows = run.rows[:transitions].double().split([states, actions, 1, states, 1], 1)
    obs, action, reward, next_obs, _ = rows
    return torch.cat([obs, action, torch.ones_like(reward)], 1), torch.cat([next_obs, reward], 1)


def collect(task: str, actor: dict | None, transitions: int) -> tuple[Tensor, Tensor]:
    """x = [s, a, 1] [N, S + A + 1] and y = [s', r] [N, S + 1], float64 of the buffer's float32.

    Resets are seeded as in training; actions are uniform, or samples of the actor's policy.
    """
    load_task(task)
    env = mbrl.make_env(task)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    nets = {"actor": mbrl.mlp(obs_dim, 2 * action_dim)}
    draw = {"generator": torch.Generator().manual_seed(DATA_SEED)}
    rows, episode, over = [], 0, True
    for _ in range(transitions):
        if over:
            obs, _ = env.reset(seed=mbrl.derive_seed(DATA_SEED, 0, episode))
            episode += 1
        if actor is None:
            action = 2 * torch.rand(action_dim, **draw) - 1
        else:
            state, noise = torch.as_tensor(obs).float(), torch.randn(action_dim, **draw)
            action, _ = mbrl.sample_action(nets, actor, state, noise)
        next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
        rows.append(np.concatenate([obs, action, [1], next_obs, [reward]]))
        obs, over = next_obs, terminated or truncated
    env.close()
    rows = torch.as_tensor(np.array(rows)).float().double()
    return rows[:, : obs_dim + action_dim + 1], rows[:, obs_dim + action_dim + 1 :]


def baseline(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """W [S + A + 1, S + 1] of the baseline [s, a, 1] W, from x [N, S + A + 1] and y [N, S + 1]."""
    w, states = torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype), y.shape[1] - 1
    (center, scale), y_mean = mbrl.fit_scaler(x[:, :-1]), y.mean(0)
    z = (x[:, :-1] - center) / scale  # [N, S + A]
    if kind == "residual":
        w[:states, :states] = torch.eye(states)
    if kind == "per-dimension":  # w_i = Cov(s'_i, s_i) / Var(s_i); z_i = 0 where s_i is constant
        slope = (z[:, :states] * (y - y_mean)[:, :states]).mean(0) / scale[:states]
        w[:states, :states] = slope.diag()
        w[-1, :states] = y_mean[:states] - slope * center[:states]
    if kind == "ridge":
        penalty = RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
        w[:-1] = torch.linalg.solve(z.T @ z + penalty, z.T @ (y - y_mean)) / scale[:, None]
        w[-1] = y_mean - center @ w[:-1]
    return w


def units(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances of [s', r] and of [s' - s, r], [S + 1] each, and where the latter is above 0."""
    change = y - torch.cat([x[:, : y.shape[1] - 1], torch.zeros(len(y), 1)], 1)
    variances = y.var(0, correction=0), change.var(0, correction=0)
    return *variances, variances[1] > 1e-24  # as in fit_scaler


def measure_scales(x: Tensor, y: Tensor) -> tuple[dict, pd.DataFrame]:
    """The scales of a task's targets; and for each dimension of the state its rho and inflation.

    rho_i is the correlation of s_i and s'_i, within episodes as every transition is. Inflation is
    Var(s'_i - s_i) / Var(s_i), which is 2 (1 - rho_i) where s'_i varies as much as s_i.
    """
    states = y.shape[1] - 1
    after, change, live = units(x, y)
    left = ((y - x @ baseline("ridge", x, y)) ** 2).mean(0) / after
    reward, before = float(after[-1]), x[:, :states].var(0, correction=0)
    after, change, varies = after[:-1], change[:-1], live[:-1]
    inflation = change / before
    rho = (before + after - change) / (2 * (before * after).sqrt())
    scales = {
        "state_dims": states,
        "varying_dims": int(varies.sum()),
        "mean_reward": float(y[:, -1].mean()),
        "reward_variance": reward,
        "residual_over_reward": float(change.sum()) / reward if live[-1] else np.nan,
        "direct_over_reward": float(after.sum()) / reward if live[-1] else np.nan,
        "inflated_share": float((inflation[varies] > 1).double().mean()),
        "rho_min": float(rho[varies].min()),
        "rho_median": float(rho[varies].median()),
        "ridge_leaves_of_states": float(left[:-1][varies].mean()),
        "ridge_leaves_of_reward": float(left[-1]) if live[-1] else np.nan,
    }
    numbers = varies.nonzero()[:, 0].tolist()
    columns = {"dimension": numbers, "rho": rho[numbers], "inflation": inflation[numbers]}
    return scales, pd.DataFrame(columns)


class Problem(NamedTuple):
    """What one network has to learn, and what it takes to undo the change of targets; N rows."""

    inputs: Tensor  # [N, S + A], at unit scale
    targets: Tensor  # [N, S + 1]
    base: Tensor  # [N, S + 1], the baseline
    y: Tensor  # [N, S + 1], s' and r
    scaler: tuple[Tensor, Tensor]  # m and d [S + 1]

    def rows(self, index: Tensor) -> "Problem":
        """The problem of these rows alone."""
        return Problem(*(part[index] for part in self[:4]), self.scaler)


def pose(cell: str, x: Tensor, y: Tensor, train: Tensor) -> Problem:
    """The cell's problem, with all that is fitted beforehand fitted to the rows `train`."""
    scale, kind = cell.split()
    base = x @ baseline(kind, x[train], y[train])
    inputs, targets = x[:, :-1].float(), (y - base).float()
    scaler = torch.zeros(y.shape[1]), torch.ones(y.shape[1])
    if scale == "normalized":
        scaler = mbrl.fit_scaler(targets[train])
    inputs = mbrl.normalize(inputs, mbrl.fit_scaler(inputs[train]))
    return Problem(inputs, mbrl.normalize(targets, scaler), base, y, scaler)


def gradient_share(net: torch.nn.Module, params: dict, inputs: Tensor, targets: Tensor) -> float:
    """|g_r| / (|g_r| + |g_s|), of gradients with respect to the hidden layers, which all share.

    g_r is that of E[(mu - y)^2 / sigma^2 + log sigma^2] of the reward, g_s of its sum over states.
    """
    hidden = {name: p for name, p in params.items() if name.endswith(("0", "1", "2", "3"))}

    def term(hidden: dict, dims: slice) -> Tensor:
        mean, log_var = functional_call(net, params | hidden, (inputs,))
        loss = (mean - targets) ** 2 * torch.exp(-log_var) + log_var
        return loss.mean((0, 1))[dims].sum()

    grads = [torch.func.grad(term)(hidden, dims) for dims in (slice(-1, None), slice(-1))]
    of_reward, of_states = (sum((g**2).sum() for g in each.values()).sqrt() for each in grads)
    return float(of_reward / (of_reward + of_states))


def measure(net: torch.nn.Module, params: dict, held: Problem, unit: tuple) -> dict:
    """Errors, spreads and shares of one network on held-out rows, as mechanism.py defines them.

    The spread of states is the median of their dimensions. The reward's share of the loss is that
    in the sum of E[(mu - y)_i^2 / sigma_i^2] over all dimensions i.
    """
    mean, log_var = (out[0] for out in functional_call(net, params, (held.inputs,)))  # [H, S + 1]
    predicted = held.base + held.scaler[0] + held.scaler[1] * mean.double()
    error = ((predicted - held.y) ** 2).mean(0)  # [S + 1]
    noise = (held.scaler[1] ** 2 * log_var.double().exp()).mean(0)
    weighted = ((mean - held.targets) ** 2 / log_var.exp()).mean(0)
    variance, change, live = unit
    spread, varies = (noise / error).sqrt(), live[:-1]
    in_variance, in_change = ((error + noise)[:-1][varies] / v[:-1][varies] for v in unit[:2])
    error_of_change = (error / change)[:-1][varies]
    figures = {
        "reward_error": error[-1] / variance[-1],
        "reward_sampled": (error + noise)[-1] / variance[-1],
        "reward_spread": spread[-1],
        "state_error": (error / variance)[:-1][varies].mean(),
        "state_sampled": in_variance.mean(),
        "state_sampled_worst": in_variance.max(),
        "change_error": error_of_change.mean(),
        "change_sampled": in_change.mean(),
        "change_sampled_worst": in_change.max(),
        "state_spread": spread[:-1][varies].median(),
        "reward_share_of_loss": weighted[-1] / weighted.sum(),
        "reward_share_of_gradient": gradient_share(net, params, held.inputs, held.targets),
    }
    constant = [] if live[-1] else [name for name in figures if name.startswith("reward")]
    figures = {name: float(value) for name, value in figures.items()} | dict.fromkeys(constant)
    figures |= {"by_dimension": in_variance.tolist(), "change_by_dimension": in_change.tolist()}
    return figures | {"change_error_by_dimension": error_of_change.tolist()}


def by_speed(figures: dict, x: Tensor, y: Tensor) -> dict:
    """A measurement with its errors by dimension drawn together to slow and fast dimensions.

    Of those that vary, a step changes the slow ones little: Var(s'_i - s_i) < 0.1 Var(s_i).
    """
    _, change, live = units(x, y)
    before = x[:, : y.shape[1] - 1].var(0, correction=0)
    slow = (change[:-1] < 0.1 * before)[live[:-1]].numpy()
    line = {name: v for name, v in figures.items() if not name.endswith("by_dimension")}
    columns = {"error": figures["change_error_by_dimension"]}
    errors = pd.DataFrame(columns | {"sampled": figures["change_by_dimension"]})
    for name, part in {"slow": errors[slow], "fast": errors[~slow]}.items():
        line |= {f"{name}_dims": len(part), f"{name}_error": part.error.mean()}
        line |= {f"{name}_sampled": part.sampled.mean()}
        line |= {f"{name}_sampled_median": part.sampled.median()}
    return line


class Fitter:
    """Fits networks of one shape, which share what is compiled; `x` and `y` have the data."""

    def __init__(self, x: Tensor, y: Tensor, hidden: int, lr: float, compiled: bool):
        self.x, self.y = x, y
        self.args = mbrl.Args(model_hidden=hidden, model_lr=lr, compile=compiled)
        self.net = mbrl.Ensemble(1, x.shape[1] - 1, y.shape[1], hidden)
        jit = mbrl.setup_torch(self.args, torch.device("cpu"))
        self.update = jit(partial(mbrl.model_update, net=self.net, args=self.args))

    def fit(self, cell: str, seed: int, budgets: tuple[int, ...]) -> list[dict]:
        """Fits one network; returns what is measured before the first update and at each budget.

        Split, bootstrap sample, batches and initial weights follow from the seed: cells are paired.
        """
        x, y, draw, batch = self.x, self.y, {"generator": torch.Generator().manual_seed(seed)}, 256
        order = torch.randperm(len(x), **draw)
        held_out = min(int(self.args.holdout_ratio * len(x)), 5000)
        holdout, train = order[:held_out], order[held_out:]
        problem, unit = pose(cell, x, y, train), units(x, y)
        torch.manual_seed(seed)  # for the initial weights
        fresh = mbrl.Ensemble(1, x.shape[1] - 1, y.shape[1], self.args.model_hidden)
        learner = mbrl.adam_init(fresh, torch.device("cpu"))
        bootstrap, shuffled = train[torch.randint(len(train), (len(train),), **draw)], None
        epoch, found = -(-len(train) // batch), []
        for updates in range(max(budgets) + 1):
            if updates in (0, *budgets):
                figures = measure(self.net, learner["params"], problem.rows(holdout), unit)
                found.append({"cell": cell, "seed": seed, "updates": updates} | figures)
            if updates == max(budgets):
                return found
            if updates % epoch == 0:
                shuffled = bootstrap[torch.randperm(len(train), **draw)]
            first = updates % epoch * batch
            index = shuffled[torch.arange(first, first + batch) % len(train)]  # filled up
            inputs, targets = problem.inputs[index][None], problem.targets[index][None]
            learner, _ = self.update(learner, inputs, targets)


class DataSet(NamedTuple):
    """Where transitions come from."""

    task: str
    data: str  # "random", or the name of the run folder
    trained_steps: int  # environment steps that the policy was trained for
    folder: Path | None
    buffer: bool = False  # whether the run's own transitions are wanted, not new ones of its policy


@lru_cache(maxsize=1)  # the fits of one data set come one after another
def fitter(one: DataSet, transitions: int, hidden: int, lr: float, compiled: bool) -> Fitter:
    """Fits to a data set, in a worker, which has one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries' words about libraries
    if one.buffer:
        x, y = read_buffer(one.folder, transitions)
    else:
        x, y = collect(one.task, load_run(one.folder).actor if one.folder else None, transitions)
    return Fitter(x, y, hidden, lr, compiled)


def fit_all(one: DataSet, options) -> dict[str, pd.DataFrame]:
    """All fits to one data set: the rows it adds to each of the three CSV files."""
    learner = fitter(one, options.transitions, options.hidden, mbrl.Args.model_lr, options.compile)
    pairs = [(cell, seed) for seed in options.seeds for cell in CELLS]
    fits = pd.DataFrame([row for pair in pairs for row in learner.fit(*pair, options.budgets)])
    scales, dimensions = measure_scales(learner.x, learner.y)
    for cell, rows in fits[fits.updates == max(options.budgets)].groupby("cell", sort=False):
        dimensions[cell] = np.mean(rows.by_dimension.tolist(), 0)  # over seeds
    lists = [name for name in fits if name.endswith("by_dimension")]
    parts = {"dimensions": dimensions, "fits": fits.drop(columns=lists)}
    settings = {"trained_steps": one.trained_steps} | options.settings()
    parts["scales"] = pd.DataFrame([settings | scales])
    for part in parts.values():
        part.insert(0, "task", one.task)
        part.insert(1, "data", one.data)
    return parts


def fit_one(one: DataSet, lr: str, seed: int, cell: str, options) -> pd.DataFrame:
    """One fit of `updates-needed`: its rows of the CSV file."""
    learner = fitter(one, options.transitions, options.hidden, float(lr), options.compile)
    named = {"task": one.task, "data": one.data, "lr": lr, "seed": seed, "cell": cell}
    named |= {"transitions": options.transitions, "hidden": options.hidden}
    found = learner.fit(cell, seed, options.budgets)
    return pd.DataFrame([named | by_speed(figures, learner.x, learner.y) for figures in found])
