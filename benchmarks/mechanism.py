"""Why MBPO fails where it fails: the scales of a model's targets, and how well it fits each kind.

    python benchmarks/mechanism.py                                    all fourteen tasks
    python benchmarks/mechanism.py --tasks Hopper-v5 dmc/walker-run   two of them
    python benchmarks/mechanism.py --checkpoints runs/dmc-walker-run__mbpo_ftfl__1

The first two gather transitions of a uniform random policy, the third also of a trained one.

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

Finished tasks are kept in OUT/*.csv and skipped when the command is given again; OUT/*.md and
OUT/*.png are made from these files alone, of all that they hold.
"""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
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
from mechanism_report import CELLS, present  # noqa: E402

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


class Item(NamedTuple):
    """What one process works on at a time."""

    task: str
    data: str  # "random", or the name of the run folder that the policy comes from
    trained_steps: int  # environment steps that the policy was trained for
    folder: Path | None


def load_actor(folder: Path) -> tuple[str, int, dict]:
    """Task, trained steps and actor of a run of any script; InputError if there is none."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True)
        actor = {name: param.clone() for name, param in saved["agent"]["actor"]["params"].items()}
        mbrl.mlp(actor["0.weight"].shape[1], len(actor["4.bias"])).load_state_dict(actor)
        return saved["settings"]["env_id"], saved["progress"][0], actor
    except FileNotFoundError:
        raise mbrl.InputError(f"--checkpoints {folder}: there is no checkpoint.pt in it") from None
    except Exception:  # torch.load has no error of its own
        reason = "its checkpoint.pt is damaged, or not of these scripts"
        raise mbrl.InputError(f"--checkpoints {folder}: {reason}") from None


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
    figures = {
        "reward_error": error[-1] / variance[-1],
        "reward_sampled": (error + noise)[-1] / variance[-1],
        "reward_spread": spread[-1],
        "state_error": (error / variance)[:-1][varies].mean(),
        "state_sampled": in_variance.mean(),
        "state_sampled_worst": in_variance.max(),
        "change_error": (error / change)[:-1][varies].mean(),
        "change_sampled": in_change.mean(),
        "change_sampled_worst": in_change.max(),
        "state_spread": spread[:-1][varies].median(),
        "reward_share_of_loss": weighted[-1] / weighted.sum(),
        "reward_share_of_gradient": gradient_share(net, params, held.inputs, held.targets),
    }
    constant = [] if live[-1] else [name for name in figures if name.startswith("reward")]
    figures = {name: float(value) for name, value in figures.items()} | dict.fromkeys(constant)
    return figures | {"by_dimension": in_variance.tolist()}


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


def work(item: Item, options: Options) -> dict[str, pd.DataFrame]:
    """All fits of one task and policy: the rows it adds to each of the three CSV files."""
    actor = load_actor(item.folder)[2] if item.folder else None
    x, y = collect(item.task, actor, options.transitions)
    torch.compiler.reset()  # or the graphs of several tasks count against a limit
    try:  # as in the scripts, to see whether there is a C++ compiler
        torch.compile(torch.cos, disable=not options.compile)(torch.ones(1))
    except Exception as error:
        tqdm.write(f"going on uncompiled: {repr(error).splitlines()[0]}", file=sys.stderr)
        options = replace(options, compile=False)
    torch.set_float32_matmul_precision("medium")  # as in the scripts: if exact, by oneDNN
    if (torch.full((256, 256), 1 + 2**-12) @ torch.ones(256, 1)).amin() < 256.05:
        torch.set_float32_matmul_precision("highest")
    args = mbrl.Args(model_hidden=options.hidden)
    net = mbrl.Ensemble(1, x.shape[1] - 1, y.shape[1], options.hidden)
    jit = partial(torch.compile, fullgraph=True, dynamic=False, disable=not options.compile)
    update, fits = jit(partial(mbrl.model_update, net=net, args=args)), []
    for seed in options.seeds:
        for cell in CELLS:
            fits += fit(x, y, cell, seed, options.budgets, net, update, args)
            if fits_done:
                with fits_done.get_lock():
                    fits_done.value += 1
    scales, dimensions = measure_scales(x, y)
    fits, dimensions = pd.DataFrame(fits), pd.DataFrame(dimensions)
    for cell, rows in fits[fits.updates == max(options.budgets)].groupby("cell", sort=False):
        dimensions[cell] = np.mean(rows.by_dimension.tolist(), 0)  # over seeds
    parts = {"dimensions": dimensions, "fits": fits.drop(columns="by_dimension")}
    parts["scales"] = pd.DataFrame([settings_of(item, options) | scales])
    for part in parts.values():
        part.insert(0, "task", item.task)
        part.insert(1, "data", item.data)
    return parts


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


def plan(options: Options) -> tuple[list[Item], dict[str, pd.DataFrame]]:
    """What is left to do, and what is done; InputError for what can't be done or mixed."""
    limits = {"jobs": 1, "transitions": 10, "hidden": 1, "budgets": 1, "seeds": 0}
    for name, least in limits.items():
        values = np.atleast_1d(getattr(options, name)).tolist()
        valid = values and len({*values}) == len(values)
        if not valid or not all(least <= value < 2**63 for value in values):
            given = " ".join(map(str, values)) or "nothing"
            several = "different numbers of " if name in ("budgets", "seeds") else ""
            raise mbrl.InputError(f"--{name} must be {several}at least {least}, not {given}")
    items = [Item(task, "random", 0, None) for task in options.tasks]
    for folder in options.checkpoints:
        task, steps, _ = load_actor(folder)
        items.append(Item(task, folder.resolve().name, steps, folder.resolve()))
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
    for item in todo:
        try:
            mbrl.make_env(item.task).close()
        except mbrl.InputError as error:
            raise mbrl.InputError(str(error).replace("--env-id", "--tasks")) from None
    return todo, held


def run(options: Options) -> None:
    """Does what is left to do, in processes of their own, and presents all that is there."""
    todo, held = plan(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise mbrl.InputError(f"--out {options.out}: {error.strerror}; choose another") from None
    context = multiprocessing.get_context("spawn")
    counter, fits = context.Value("i", 0), len(CELLS) * len(options.seeds)
    pool = ProcessPoolExecutor(options.jobs, context, start_worker, (counter,))
    with pool, tqdm(total=len(todo) * fits, unit="fit", disable=None) as bar:
        try:
            waiting = {pool.submit(work, item, options): item for item in todo}
            while waiting:
                finished, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in finished:
                    bar.set_postfix_str(f"last {waiting.pop(future).task}")
                    save(held, future.result(), options.out)
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    present(read(options.out), options.out)


def main() -> None:
    """Does what the command line says; bad input is one line on stderr and exit code 2."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ[name] = "1"  # the workers inherit it
    try:
        run(tyro.cli(Options, description=__doc__))
    except (mbrl.InputError, BrokenProcessPool, KeyboardInterrupt) as error:
        broken = isinstance(error, BrokenProcessPool)
        said = "a worker was killed; the same command goes on" if broken else str(error)
        print(f"error: {' '.join(said.split()) or 'interrupted'}", file=sys.stderr)
        sys.exit(2 if isinstance(error, mbrl.InputError) else 1)


if __name__ == "__main__":
    main()
