"""Why MBPO fails where it fails: the scales of a model's targets, and how well it fits each kind.

    python benchmarks/mechanism.py                                    all fourteen tasks
    python benchmarks/mechanism.py --tasks Hopper-v5 dmc/walker-run   two of them
    python benchmarks/mechanism.py --checkpoints runs/dmc-walker-run__mbpo_ftfl__1
    python benchmarks/mechanism.py updates-needed --buffers runs/dmc-walker-run__sac__1

The first two gather transitions of a uniform random policy, the third also of a trained one. The
last asks how many updates each target needs: it fits three of the six cells ten times as long, on
random transitions of three tasks and on those that the named runs hold in their replay buffers.

One network of the scripts' ensemble learns from N transitions (s, a, r, s'), as in the scripts but
without early stopping, in six cells. In all of them a baseline b is subtracted that is linear,

    target        y = ([s', r] - b - m) / d,       b = [s, a, 1] W
    prediction    [s', r] = b + m + d N(mu(x), sigma^2(x)),   x = (s, a) at unit scale

    raw           m = 0, d = 1
    normalized    m and d: mean and standard deviation of [s', r] - b
    residual      b = [s, 0]                       raw: mbpo.py; normalized: the ablation
    direct        b = 0                            normalized: mbpo_ftfl.py
    per-dimension b = [w * s + c, 0]               w, c: least squares of s'_i on s_i, each i
    ridge         b = B [s, a, 1]                  B: ridge regression of s' and r on s, a and 1

W, m, d and the scale of x come from the training split. On the holdout, in each dimension i, with
the variance V_i of s' or of r over all N transitions as the unit that all cells share:

    error         E[(b + m + d mu - [s', r])_i^2] / V_i     of the mean prediction
    sampled       error + E[(d sigma)_i^2] / V_i            expected of the sample that rollouts use
    spread        sqrt(E[(d sigma)_i^2] / (V_i error))      predicted over actual; 1 is calibrated

States count by the mean over their dimensions; `change` is the same in units of Var(s'_i - s_i),
in which to predict s' = s is an error near 1. Dimensions that never change are left out.
`updates-needed` splits the change into slow dimensions, Var(s'_i - s_i) < 0.1 Var(s_i), and fast.

Finished tasks (with `updates-needed`, finished fits) are kept in OUT/*.csv and skipped when the
command is given again; OUT/*.md and OUT/*.png are made from these files alone, of all that they
hold.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from mechanism_report import CELLS, present, present_needed  # noqa: E402

import mbpo_residual_ablation as mbrl  # noqa: E402

SUITE = "hopper-hop hopper-stand humanoid-stand humanoid-walk humanoid-run quadruped-run"
SUITE += " quadruped-walk walker-run cheetah-run"
TASKS = (*(f"dmc/{task}" for task in SUITE.split()), "Hopper-v5", "Walker2d-v5", "HalfCheetah-v5")
TASKS += ("Ant-v5", "Humanoid-v5")
FILES = ("dimensions", "fits", "scales")  # OUT/*.csv
SETTINGS = ("trained_steps", "transitions", "hidden", "budgets", "seeds")
RIDGE = 1e-3  # penalty of ridge regression on inputs at unit scale, against a sum over transitions
DATA_SEED = 0  # of the transitions, which all seeds of fits share


@dataclass
class Options:
    tasks: tuple[str, ...] = TASKS  # tasks to fit on transitions of a uniform random policy
    checkpoints: tuple[Path, ...] = ()  # run folders of the scripts: their policies' transitions
    jobs: int = 2  # tasks at a time, one process with one thread each
    transitions: int = 20_000  # transitions of each task and policy
    budgets: tuple[int, ...] = (300, 1000, 3000)  # gradient steps after which a fit is measured
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of split, bootstrap sample, weights and batches
    hidden: int = 200  # units in each of the network's four hidden layers
    out: Path = ROOT / "benchmarks/results/mechanism"  # folder of the results
    overwrite: bool = False  # fit again what is finished
    compile: bool = True  # compile the update with torch.compile


@dataclass
class Needed:
    """Options of `updates-needed`; the defaults are what benchmarks/results/updates_needed has."""

    buffers: tuple[Path, ...] = ()  # run folders of the scripts, for the first rows of their buffer
    tasks: tuple[str, ...] = ("dmc/humanoid-stand", "dmc/hopper-stand", "Hopper-v5")  # random ones
    cells: tuple[str, ...] = ("normalized residual", "normalized direct", "normalized ridge")
    lr: tuple[float, ...] = (mbrl.Args.model_lr,)  # Adam step sizes; here the scripts'
    budgets: tuple[int, ...] = (500, 1000, 2000, 3000, 5000, 8000, 12_000, 20_000, 30_000)
    seeds: tuple[int, ...] = (1, 2)  # seeds of split, bootstrap sample, weights and batches
    jobs: int = 2  # fits at a time, one process with one thread each
    transitions: int = 20_000  # transitions of each data set
    hidden: int = 200  # units in each of the network's four hidden layers
    out: Path = ROOT / "benchmarks/results/updates_needed"  # folder of the results
    compile: bool = True  # compile the update with torch.compile


class Item(NamedTuple):
    """What one process works on at a time."""

    task: str
    data: str  # "random", or the name of the run folder that the policy comes from
    trained_steps: int  # environment steps that the policy was trained for
    folder: Path | None


class Job(NamedTuple):
    """One fit of `updates-needed`; all but the folder are columns of its CSV file."""

    task: str
    data: str  # "random", or the name of the run folder that the buffer lies in
    lr: str  # as the CSV file spells it
    seed: int
    cell: str
    folder: Path | None


class Run(NamedTuple):
    """What a checkpoint of any script has of its run."""

    task: str
    steps: int  # environment steps trained
    actor: dict  # parameters by name
    rows: Tensor  # [N, 2S + A + 2], the replay buffer: s, a, r, s', terminated


def load_run(folder: Path, flag: str) -> Run:
    """The run whose checkpoint lies in the folder; InputError if there is none."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True)
        actor = {name: param.clone() for name, param in saved["agent"]["actor"]["params"].items()}
        mbrl.mlp(actor["0.weight"].shape[1], len(actor["4.bias"])).load_state_dict(actor)
        steps, rows = saved["progress"][0], saved["rows"].flatten(1)
        return Run(saved["settings"]["env_id"], steps, actor, rows)
    except (FileNotFoundError, NotADirectoryError):
        raise mbrl.InputError(f"{flag} {folder}: there is no checkpoint.pt in it") from None
    except Exception:  # torch.load has no error of its own
        reason = "its checkpoint.pt is damaged, or not of these scripts"
        raise mbrl.InputError(f"{flag} {folder}: {reason}") from None


def read_buffer(folder: Path, transitions: int) -> tuple[str, Tensor, Tensor]:
    """The run's task, and x and y as of `collect`, of the first so many rows of its buffer."""
    run = load_run(folder, "--buffers")
    states, actions = run.actor["0.weight"].shape[1], len(run.actor["4.bias"]) // 2
    held, width, parts = len(run.rows), run.rows.shape[1], [states, actions, 1, states, 1]
    fault = None
    if held < transitions:
        fault = f"its buffer holds {held} transitions, fewer than the {transitions} to fit"
    elif width != sum(parts):
        fault = f"its transitions have {width} numbers, not {sum(parts)} as its policy's have"
    elif not run.rows[:transitions].isfinite().all():
        fault = "its buffer holds numbers that are not finite"
    if fault:
        raise mbrl.InputError(f"--buffers {folder}: {fault}")
    obs, action, reward, next_obs, _ = run.rows[:transitions].double().split(parts, 1)
    x = torch.cat([obs, action, torch.ones_like(reward)], 1)
    return run.task, x, torch.cat([next_obs, reward], 1)


def collect(task: str, actor: dict | None, transitions: int) -> tuple[Tensor, Tensor]:
    """x = [s, a, 1] [N, S + A + 1] and y = [s', r] [N, S + 1], float64 of the buffer's float32.

    Resets are seeded as in training; actions are uniform, or samples of the actor's policy.
    """
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


def measure_scales(x: Tensor, y: Tensor) -> tuple[dict, list[dict]]:
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
    return scales, pd.DataFrame(columns).to_dict("records")


def is_slow(x: Tensor, y: Tensor) -> Tensor:
    """Of the D dimensions that vary, which a step changes little: bool [D]."""
    _, change, live = units(x, y)
    before = x[:, : y.shape[1] - 1].var(0, correction=0)
    return (change[:-1] < 0.1 * before)[live[:-1]]


class Problem(NamedTuple):
    """What one network has to learn, and what it takes to undo the change of targets; N rows."""

    inputs: Tensor  # [N, S + A], at unit scale
    targets: Tensor  # [N, S + 1]
    base: Tensor  # [N, S + 1], the baseline
    scaler: tuple[Tensor, Tensor]  # m and d [S + 1]
    y: Tensor  # [N, S + 1], s' and r


def pose(cell: str, x: Tensor, y: Tensor, train: Tensor) -> Problem:
    """The cell's problem, with all that is fitted beforehand fitted to the rows `train`."""
    scale, kind = cell.split()
    base = x @ baseline(kind, x[train], y[train])
    inputs, targets = x[:, :-1].float(), (y - base).float()
    scaler = torch.zeros(y.shape[1]), torch.ones(y.shape[1])
    if scale == "normalized":
        scaler = mbrl.fit_scaler(targets[train])
    inputs = mbrl.normalize(inputs, mbrl.fit_scaler(inputs[train]))
    return Problem(inputs, mbrl.normalize(targets, scaler), base, scaler, y)


def gradient_share(net: mbrl.Ensemble, params: dict, inputs: Tensor, targets: Tensor) -> float:
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


def measure(net: mbrl.Ensemble, params: dict, held: Problem, unit: tuple) -> dict:
    """Errors, spreads and shares of one network on held-out rows; the equations stand above.

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


def fit(x: Tensor, y: Tensor, cell: str, seed: int, budgets, net, update, args) -> list[dict]:
    """Fits one network; returns what is measured before the first update and at each budget.

    Split, bootstrap sample, batches and initial weights follow from the seed: cells are paired.
    """
    draw, n, batch = {"generator": torch.Generator().manual_seed(seed)}, len(x), 256
    order, held_out = torch.randperm(n, **draw), min(int(args.holdout_ratio * n), 5000)
    holdout, train = order[:held_out], order[held_out:]
    problem, unit = pose(cell, x, y, train), units(x, y)
    rows = {name: part[holdout] for name, part in problem._asdict().items() if name != "scaler"}
    held = problem._replace(**rows)
    torch.manual_seed(seed)  # for the initial weights
    fresh = mbrl.Ensemble(1, x.shape[1] - 1, y.shape[1], args.model_hidden)
    learner = mbrl.adam_init(fresh, torch.device("cpu"))
    bootstrap, shuffled = train[torch.randint(len(train), (len(train),), **draw)], None
    epoch, found = -(-len(train) // batch), []
    for updates in range(max(budgets) + 1):
        if updates in (0, *budgets):
            figures = measure(net, learner["params"], held, unit)
            found.append({"cell": cell, "seed": seed, "updates": updates} | figures)
        if updates == max(budgets):
            return found
        if updates % epoch == 0:
            shuffled = bootstrap[torch.randperm(len(train), **draw)]
        first = updates % epoch * batch
        index = shuffled[torch.arange(first, first + batch) % len(train)]  # filled up, as there
        learner, _ = update(learner, problem.inputs[index][None], problem.targets[index][None])


@lru_cache(maxsize=1)  # the fits of one data set come one after another
def prepare(in_dim: int, out_dim: int, hidden: int, lr: float, compiled: bool) -> tuple:
    """What fits of one shape share: the network, its update, compiled if possible, and settings."""
    torch.compiler.reset()  # or the graphs of several tasks count against a limit
    try:  # as in the scripts, to see whether there is a C++ compiler
        torch.compile(torch.cos, disable=not compiled)(torch.ones(1))
    except Exception as error:
        tqdm.write(f"going on uncompiled: {repr(error).splitlines()[0]}", file=sys.stderr)
        compiled = False
    torch.set_float32_matmul_precision("medium")  # as in the scripts: if exact, by oneDNN
    if (torch.full((256, 256), 1 + 2**-12) @ torch.ones(256, 1)).amin() < 256.05:
        torch.set_float32_matmul_precision("highest")
    args = mbrl.Args(model_hidden=hidden, model_lr=lr)
    net = mbrl.Ensemble(1, in_dim, out_dim, hidden)
    jit = partial(torch.compile, fullgraph=True, dynamic=False, disable=not compiled)
    return net, jit(partial(mbrl.model_update, net=net, args=args)), args


def count_fit() -> None:
    """Tells the parent, if there is one, that a fit is finished."""
    if fits_done:
        with fits_done.get_lock():
            fits_done.value += 1


def work(item: Item, options: Options) -> dict[str, pd.DataFrame]:
    """All fits of one task and policy: the rows it adds to each of the three CSV files."""
    actor = load_run(item.folder, "--checkpoints").actor if item.folder else None
    x, y = collect(item.task, actor, options.transitions)
    shape = x.shape[1] - 1, y.shape[1], options.hidden
    net, update, args = prepare(*shape, mbrl.Args.model_lr, options.compile)
    fits = []
    for seed in options.seeds:
        for cell in CELLS:
            fits += fit(x, y, cell, seed, options.budgets, net, update, args)
            count_fit()
    scales, dimensions = measure_scales(x, y)
    fits, dimensions = pd.DataFrame(fits), pd.DataFrame(dimensions)
    for cell, rows in fits[fits.updates == max(options.budgets)].groupby("cell", sort=False):
        dimensions[cell] = np.mean(rows.by_dimension.tolist(), 0)  # over seeds
    lists = [name for name in fits if name.endswith("by_dimension")]
    parts = {"dimensions": dimensions, "fits": fits.drop(columns=lists)}
    parts["scales"] = pd.DataFrame([settings_of(item, options) | scales])
    for part in parts.values():
        part.insert(0, "task", item.task)
        part.insert(1, "data", item.data)
    return parts


@lru_cache(maxsize=1)
def load_data(task: str, folder: Path | None, transitions: int) -> tuple[Tensor, Tensor]:
    """x and y of one data set: a random policy's, or of the buffer in a run folder."""
    return read_buffer(folder, transitions)[1:] if folder else collect(task, None, transitions)


def split(found: list[dict], slow: Tensor) -> list[dict]:
    """Measurements with the errors of the change by dimension [D] drawn together by speed."""
    lines = []
    for figures in found:
        line = {name: v for name, v in figures.items() if not name.endswith("by_dimension")}
        columns = {"error": figures["change_error_by_dimension"]}
        errors = pd.DataFrame(columns | {"sampled": figures["change_by_dimension"]})
        for name, part in {"slow": errors[slow.numpy()], "fast": errors[~slow.numpy()]}.items():
            line[f"{name}_dims"] = len(part)
            line[f"{name}_error"], line[f"{name}_sampled"] = part.mean()
            line[f"{name}_sampled_median"] = part.sampled.median()
        lines.append(line)
    return lines


def work_needed(job: Job, options: Needed) -> pd.DataFrame:
    """One fit of `updates-needed`: its rows of the CSV file."""
    x, y = load_data(job.task, job.folder, options.transitions)
    shape = x.shape[1] - 1, y.shape[1], options.hidden
    net, update, args = prepare(*shape, float(job.lr), options.compile)
    found = fit(x, y, job.cell, job.seed, options.budgets, net, update, args)
    count_fit()
    sizes = {"transitions": options.transitions, "hidden": options.hidden}
    return pd.DataFrame([job._asdict() | sizes | line for line in split(found, is_slow(x, y))])


fits_done = None  # in a worker: the counter that it shares with the parent


def start_worker(counter) -> None:
    """One thread, no warnings, and an end when the parent ends or Ctrl-C is pressed."""
    global fits_done
    fits_done = counter
    torch.set_num_threads(1)
    warnings.showwarning = lambda *_, **__: None  # as in main
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def settings_of(item: Item, options: Options) -> dict:
    """What decides an item's figures besides its task, in words, as scales.csv holds it."""
    values = vars(options) | {"trained_steps": item.trained_steps}
    values |= {name: " ".join(map(str, values[name])) for name in ("budgets", "seeds")}
    return {name: str(values[name]) for name in SETTINGS}


def read(out: Path) -> dict[str, pd.DataFrame]:
    """The three CSV files by name, less what a task that was cut off left in them."""
    settings = dict.fromkeys(SETTINGS, str)
    try:
        held = {name: pd.read_csv(out / f"{name}.csv", dtype=settings) for name in FILES}
        scales = held["scales"].set_index(["task", "data"]).index
        return {k: v[v.set_index(["task", "data"]).index.isin(scales)] for k, v in held.items()}
    except FileNotFoundError:
        return {name: pd.DataFrame(columns=["task", "data", *SETTINGS]) for name in FILES}
    except (OSError, ValueError, KeyError):
        reason = "one of its CSV files is damaged; choose another"
        raise mbrl.InputError(f"--out {out}: {reason}") from None


def save(held: dict[str, pd.DataFrame], parts: dict[str, pd.DataFrame], out: Path) -> None:
    """Puts an item's rows in the place of its old ones; scales.csv, which says it is done, last."""
    task, data = parts["scales"].loc[0, ["task", "data"]]
    for name in FILES:
        kept = held[name][(held[name].task != task) | (held[name].data != data)]
        table = pd.concat([part for part in (kept, parts[name]) if len(part)])
        held[name] = table.sort_values(["task", "data"], kind="stable", ignore_index=True)
        text = held[name].to_csv(index=False, float_format="%.6g")
        mbrl.write_file(out / f"{name}.csv", text.encode())


LIMITS = {"jobs": 1, "transitions": 10, "hidden": 1, "budgets": 1, "seeds": 0}


def check_numbers(options: Options | Needed, limits: dict) -> None:
    """InputError for an option below its limit, for one without numbers, for one twice."""
    for name, least in limits.items():
        values = np.atleast_1d(getattr(options, name)).tolist()
        valid = values and len({*values}) == len(values)
        if not valid or not all(least <= value < 2**63 for value in values):
            given = " ".join(map(str, values)) or "nothing"
            several = "different numbers of " if name in ("budgets", "seeds", "lr") else ""
            raise mbrl.InputError(f"--{name} must be {several}at least {least}, not {given}")


def check_tasks(tasks) -> None:
    """InputError for a task that can't be made."""
    for task in tasks:
        try:
            mbrl.make_env(task).close()
        except mbrl.InputError as error:
            raise mbrl.InputError(str(error).replace("--env-id", "--tasks")) from None


def plan(options: Options) -> tuple[list[Item], dict[str, pd.DataFrame]]:
    """What is left to do, and what is done; InputError for what can't be done or mixed."""
    check_numbers(options, LIMITS)
    items = [Item(task, "random", 0, None) for task in options.tasks]
    for folder in options.checkpoints:
        run = load_run(folder, "--checkpoints")
        items.append(Item(run.task, folder.resolve().name, run.steps, folder.resolve()))
    wanted = {item[:2]: item for item in items}
    if len(wanted) < len(items) or not items:
        raise mbrl.InputError("--tasks and --checkpoints must name something, and each only once")
    held = read(options.out)
    done = held["scales"].set_index(["task", "data"])[list(SETTINGS)].T.to_dict()
    for name, was in done.items():  # what stays must have been made with the same settings
        item = wanted.get(name, Item(*name, was["trained_steps"], None))
        for setting, now in settings_of(item, options).items():
            if was[setting] != now and not (options.overwrite and name in wanted):
                fault = f"holds {' of '.join(name)} with {setting} {was[setting]}, not {now}"
                raise mbrl.InputError(f"--out {options.out} {fault}: choose another")
    todo = [item for item in items if options.overwrite or item[:2] not in done]
    check_tasks(item.task for item in todo)
    return todo, held


KEY = list(Job._fields[:-1])  # of one fit of `updates-needed`


def read_needed(out: Path) -> pd.DataFrame:
    """The finished fits of `updates-needed`, of which a CSV file is written whole or not at all."""
    try:
        held = pd.read_csv(out / "fits.csv", dtype={"lr": str})
        return held.astype({"seed": int, "updates": int, "transitions": int, "hidden": int})
    except FileNotFoundError:
        return pd.DataFrame(columns=[*KEY, "updates", "transitions", "hidden"])
    except (OSError, ValueError, KeyError):
        raise mbrl.InputError(f"--out {out}: its fits.csv is damaged; choose another") from None


def save_needed(rows: pd.DataFrame, out: Path) -> None:
    """Adds the rows of a fit to the CSV file, which is sorted."""
    rows = pd.concat(
        [part for part in (read_needed(out), rows.drop(columns="folder")) if len(part)]
    )
    rows = rows.sort_values([*KEY, "updates"], ignore_index=True)
    mbrl.write_file(out / "fits.csv", rows.to_csv(index=False, float_format="%.6g").encode())


def plan_needed(options: Needed) -> list[Job]:
    """The fits that are left to do; InputError for what can't be done or mixed."""
    check_numbers(options, LIMITS | {"lr": 1e-9})
    if not options.cells or not {*options.cells} <= {*CELLS}:
        given = ", ".join(options.cells) or "nothing"
        raise mbrl.InputError(f"--cells must be of {', '.join(CELLS)}, not {given}")
    sets = []  # task, data, folder
    for folder in options.buffers:
        task = read_buffer(folder, options.transitions)[0]
        sets.append((task, folder.resolve().name, folder.resolve()))
    sets += [(task, "random", None) for task in options.tasks]
    if len({one[:2] for one in sets}) < len(sets) or not sets:
        raise mbrl.InputError("--tasks and --buffers must name something, and each only once")
    held = read_needed(options.out)
    for name, now in {"transitions": [options.transitions], "hidden": [options.hidden]}.items():
        if len(held) and (was := held[name].unique().tolist()) != now:
            fault = f"holds fits with {name} {was[0]}, not {now[0]}: choose another"
            raise mbrl.InputError(f"--out {options.out} {fault}")
    if len(held) and {*held.updates} != {0, *options.budgets}:
        was = " ".join(map(str, sorted({*held.updates} - {0})))
        raise mbrl.InputError(f"--out {options.out} holds fits with budgets {was}: choose another")
    jobs = [
        Job(task, data, f"{lr:g}", seed, cell, folder)
        for task, data, folder in sets
        for lr in options.lr
        for seed in options.seeds
        for cell in dict.fromkeys(options.cells)
    ]
    done = {*held[KEY].itertuples(index=False, name=None)}
    todo = [job for job in jobs if job[:-1] not in done]
    check_tasks(dict.fromkeys(job.task for job in todo if not job.folder))
    return todo


def make_folder(out: Path) -> None:
    """The folder of the results; InputError if there can't be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise mbrl.InputError(f"--out {out}: {error.strerror}; choose another") from None


def in_processes(do, todo: list, options: Options | Needed, fits: int, keep) -> None:
    """Calls keep(do(item, options)) for all items, `do` in processes of their own."""
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(options.jobs, context, start_worker, (counter,))
    with pool, tqdm(total=fits, unit="fit", disable=None) as bar:
        try:
            waiting = {pool.submit(do, item, options): item for item in todo}
            while waiting:
                finished, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in finished:
                    bar.set_postfix_str(f"last {waiting.pop(future).task}")
                    keep(future.result())
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def run(options: Options) -> None:
    """Does what is left to do, and presents all that is there."""
    todo, held = plan(options)
    make_folder(options.out)
    fits = len(todo) * len(CELLS) * len(options.seeds)
    in_processes(work, todo, options, fits, lambda parts: save(held, parts, options.out))
    present(read(options.out), options.out)


def run_needed(options: Needed) -> None:
    """Does the fits that are left to do, each kept when finished, and presents all there are."""
    todo = plan_needed(options)
    make_folder(options.out)
    keep = partial(save_needed, out=options.out)
    in_processes(work_needed, todo, options, len(todo), keep)
    present_needed(read_needed(options.out), options.out)


def main() -> None:
    """Does what the command line says; bad input is one line on stderr and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"  # the workers inherit it
    try:
        if sys.argv[1:2] == ["updates-needed"]:
            name, words = f"{Path(__file__).name} {sys.argv[1]}", sys.argv[2:]
            run_needed(tyro.cli(Needed, prog=name, args=words, description=__doc__))
        else:
            run(tyro.cli(Options, description=__doc__))
    except (mbrl.InputError, BrokenProcessPool, KeyboardInterrupt) as error:
        broken = isinstance(error, BrokenProcessPool)
        said = "a worker was killed; the same command goes on" if broken else str(error)
        print(f"error: {' '.join(said.split()) or 'interrupted'}", file=sys.stderr)
        sys.exit(2 if isinstance(error, mbrl.InputError) else 1)


if __name__ == "__main__":
    main()
