"""How wrong a model is where MBPO asks it: at states of the data, with actions the data lack.

    python benchmarks/mechanism.py                  one fit, by gradient steps
    python benchmarks/mechanism.py --later 500      and later fits, while the data grow
    python benchmarks/mechanism.py scales           Var[s' - s] / Var[r] and rho, on fifteen tasks

A rollout starts at a state s of the replay buffer and takes a new action a. Its error can be
measured exactly: set the simulator to s, take a, and compare. The data are N transitions by a
uniform random policy, or by a run's own (--checkpoints). An ensemble of E members learns from them
by the scripts' own functions, and its errors are measured on three sets:

    rows          rows of the data that the fit holds out at random, among neighbours it learns from
    actions       the states of 2 in 5 rows of the data, each with a new action of the same policy
    episodes      5,000 transitions of other episodes

Member e predicts s' and r with mean mu_e and deviation sigma_e. In each dimension i, with v_i the
variance of s'_i - s_i, or of r, over the data, and means over members and transitions:

    error_i       E[(mu_e - [s', r])_i^2] / v_i                 of the mean prediction
    sampled_i     error_i + E[sigma_e,i^2] / v_i                of the samples that rollouts take
    nll_i         E[(mu_e - [s', r])_i^2 / sigma_e,i^2 + log(sigma_e,i^2 / v_i)]

    reward        error of r; 1 is no better than the mean reward
    change        sampled_i, mean over the dimensions of s'; 1: no better than s + the mean change
    mean_change   error_i, mean over the dimensions of s'
    nll           nll_i, mean over all dimensions

Dimensions in which s' - s never varies are left out. A task is refused if an action taken again
from the same simulator state leads elsewhere: it keeps state outside of MuJoCo's mjData.

A cell is a name in CELLS, or a command line: --cells "mbpo_ftfl --model-lr 3e-4" build/mine. Fits
are kept in OUT/errors.csv and not made again. OUT/summary.md, also printed, has reward / change on
`actions`, OUT/tables.md on all sets; OUT/errors.png draws single fits on `actions`.
"""

import itertools
import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import gymnasium as gym
import joblib
import matplotlib
import mujoco
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, InputError, load_script, markdown, parse, run_tool
from diffs import write
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

matplotlib.use("Agg")  # pictures without a display
TASKS = "dmc/walker-run dmc/humanoid-stand dmc/quadruped-walk dmc/hopper-stand dmc/finger-spin"
TASKS += " HalfCheetah-v5"
SUITE = "hopper-hop hopper-stand humanoid-stand humanoid-walk humanoid-run quadruped-run"
SUITE += " quadruped-walk walker-run cheetah-run cartpole-swingup"
GYM = " Hopper-v5 Walker2d-v5 HalfCheetah-v5 Ant-v5 Humanoid-v5"
FIFTEEN = " ".join(f"dmc/{task}" for task in SUITE.split()) + GYM
CELLS = {  # name: script and options
    "raw s' - s": "mbpo",
    "raw s'": "mbpo_residual_ablation --no-normalize-targets --no-predict-residual",
    "unit s' - s": "mbpo_residual_ablation",
    "unit s'": "mbpo_ftfl",
    "ridge": "build/mbpo_ftfl_ridge",
}
FIT = ["task", "data", "schedule", "members", "cell", "beta", "seed"]  # which fit it is
ROW = [*FIT, "transitions", "updates", "set"]  # and where it is measured
KEYS = {"errors": ROW, "dimensions": [*ROW, "dimension"]}
CPU = torch.device("cpu")


@dataclass
class Options:
    tasks: tuple[str, ...] = (*TASKS.split(),)  # with a uniform random policy
    checkpoints: tuple[Path, ...] = ()  # run folders, each for its task and its sampled policy
    cells: tuple[str, ...] = ("raw s' - s", "unit s' - s", "unit s'", "ridge")  # what is fitted
    betas: tuple[float, ...] = (0.0, 0.5)  # each as --model-beta
    seeds: tuple[int, ...] = (1, 2)  # seeds of split, bootstrap samples, weights and batches
    members: int = 7  # networks in the ensemble
    transitions: int = 5000  # transitions of the first fit
    budgets: tuple[int, ...] = (250, 500, 1000, 2000, 4000)  # gradient steps to measure after
    later: int | None = None  # instead of one fit: gradient steps of every later fit
    first: int = 1000  # with --later: gradient steps of the first fit
    every: int = 1000  # with --later: new transitions between fits
    at: tuple[int, ...] = (5000, 10_000, 20_000)  # with --later: transitions to measure at
    fresh: bool = False  # with --later: a new ensemble, and --first, whenever the data have doubled
    dimensions: bool = False  # write error, sampled and nll by dimension, too: OUT/dimensions.csv
    jobs: int = 2  # fits at a time, one process with one thread each
    compile: bool = True  # compile the update with torch.compile
    out: Path = RESULTS / "mechanism"  # folder of the results


@dataclass
class Scales:
    tasks: tuple[str, ...] = (*FIFTEEN.split(),)  # tasks
    transitions: int = 20_000  # transitions of a uniform random policy
    out: Path = RESULTS / "mechanism"  # scales.csv is written there


# --- Data -----------------------------------------------------------------------------------------
def simulator(env: gym.Env) -> list:
    """mjModel and mjData of a task of dm_control or Gymnasium; fewer of another."""
    physics = getattr(env.unwrapped, "physics", env.unwrapped)
    parts = [getattr(physics, name) for name in ("model", "data") if hasattr(physics, name)]
    return [getattr(part, "ptr", part) for part in parts]


def collect(task: str, run: Path | None, count: int, seed: int = 0, asked: bool = True) -> list:
    """Rows [N, 2S + A + 2]; if asked, of new actions [M, 2S + A + 2], at which rows [M]; float64.

    Actions are uniformly random, or a run's sampled ones.
    """
    script = load_script("mbpo.py")
    env, sim = script.make_env(task), script.make_env(task)
    if asked and len(simulator(sim)) < 2:
        raise script.InputError(f"{task} can't be measured: it is no task of MuJoCo")
    size = env.action_space.shape
    act = (
        script.load_policy(run, sampled=True) if run else lambda _: torch.rand(size).numpy() * 2 - 1
    )
    torch.manual_seed(seed)  # of all actions
    rows, others, numbers, over, sim_over = [], [], [], True, True

    def step(env: gym.Env, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, bool]:
        next_obs, reward, terminated, truncated, _ = env.step(action)
        return np.hstack([obs, action, reward, next_obs, terminated]), terminated or truncated

    for t in range(count):
        if over:
            obs, _ = env.reset(seed=script.derive_seed(seed, t))
        action, again = act(obs), None
        if asked and t % 5 < 2:
            for a in (act(obs), action):
                if sim_over:  # by its own clock
                    sim.reset(seed=0)
                mujoco.mj_copyData(simulator(sim)[1], *simulator(env))
                other, (again, sim_over) = again, step(sim, obs, a)
            others.append(other)
            numbers.append(t)
        row, over = step(env, obs, action)
        if again is not None and not np.allclose(again, row, rtol=1e-6, atol=1e-6):
            gap = f"an action taken again gives another s' or r, by {np.abs(again - row).max():.2g}"
            raise script.InputError(f"{task} can't be measured: {gap}; it has state outside mjData")
        rows.append(row)
        obs = row[-1 - len(obs) : -1]
    return [torch.as_tensor(np.array(part)) for part in (rows, others, numbers)]


@lru_cache(maxsize=1)  # the fits to one data set come one after another
def data_of(task: str, run: Path | None, count: int) -> tuple:
    """Rows of the data, of new actions, at which rows, rows of other episodes; float32."""
    (rows, others, numbers), unseen = collect(task, run, count), collect(task, run, 5000, 1, False)
    return rows.float(), others.float(), numbers, unseen[0].float()


def variances(data) -> Tensor:
    """v [S + 1]: variances of s' - s and r over a batch, float64; nan where nothing varies."""
    change = torch.cat([data.next_obs - data.obs, data.reward[:, None]], -1).double()
    variance = change.var(0, correction=0)
    return variance.where(variance > 1e-24, torch.nan)


# --- Fits -----------------------------------------------------------------------------------------
@lru_cache(maxsize=1)  # what is compiled serves the seeds of a fit
def pose(task: str, cell: str, beta: float, members: int, compile: bool) -> tuple:
    """A cell's script, as a module; its arguments; its update(learner, x, y) -> loss, in place."""
    name, *words = shlex.split(CELLS.get(cell, cell)) or [""]
    script = load_script(f"{name}.py")
    args = parse(script.Args, "a cell's script", [*words, "--model-beta", str(beta)])
    args = replace(args, ensemble_size=members, num_elites=members, device="cpu", compile=compile)
    script.set_up_torch(script.check_args(args), CPU)
    return script, args, script.compiled_update(script.model_update, args)


def plan(options: Options) -> tuple[str, list, dict]:
    """Its name, fits (transitions, gradient steps, if new), {steps in all: transitions} to measure."""
    n, first, later, every = options.transitions, options.first, options.later, options.every
    if later is None:
        return "one fit", [(n, max(options.budgets), True)], dict.fromkeys(options.budgets, n)
    fits, places, born, done = [], {}, 0, 0
    for size in range(n, max(options.at) + 1, every):
        new = not fits or (options.fresh and size >= 2 * born)
        born, updates = (size, first) if new else (born, later)
        fits.append((size, updates, new))
        done += updates
        if size in options.at:
            places[done] = size
    return f"{first}, {later} every {every}" + ", fresh" * options.fresh, fits, places


def errors_of(model: dict, data, unit: Tensor, script, args) -> dict[str, Tensor]:
    """error, sampled and nll [S + 1] on a batch, float64; nan where v, here `unit` [S + 1], is."""
    mean, std = (x.double() for x in script.predict(model, data.obs, data.action, args))
    truth = torch.cat([data.next_obs, data.reward[:, None]], -1)
    square, variance = (mean - truth) ** 2, std**2  # [E, B, S + 1]
    nll = square / variance + (variance / unit).log()
    error, spread, nll = (x.mean((0, 1)) for x in (square / unit, variance / unit, nll))
    return {"error": error, "sampled": error + spread, "nll": nll}


def fit(task: str, run: Path | None, cell: str, beta: float, seed: int, options: Options) -> dict:
    """All fits of an ensemble, in a worker: its rows of each CSV file."""
    torch.set_num_threads(1)
    schedule, fits, places = plan(options)
    rows, others, numbers, unseen = data_of(task, run, fits[-1][0])
    script, args, update = pose(task, cell, beta, options.members, options.compile)
    env = script.make_env(task)
    sizes = [env.observation_space.shape[0], env.action_space.shape[0]]  # S, A
    unpack = script.ReplayBuffer(1, *sizes, CPU).unpack
    generator, held = torch.Generator().manual_seed(seed), torch.Generator()
    torch.manual_seed(seed)  # for the initial weights
    key = [task, run.name if run else "random", schedule, options.members, cell, beta, seed]
    key, snapshots, counter = dict(zip(FIT, key, strict=True)), {}, itertools.count(1)

    def counted(learner: dict, *batch: Tensor) -> Tensor:
        loss, done = update(learner, *batch), next(counter)
        if done in places:
            snapshots[done] = tree_map(Tensor.clone, learner["params"])
        return loss

    errors, dimensions = [], []
    for n, updates, new in fits:
        if new:
            shape = options.members, sum(sizes), sizes[0] + 1, args.model_hidden
            learner = script.adam_init(script.init_ensemble(*shape), CPU)
        held.set_state(generator.get_state())
        _, holdout = script.split(n, args, held)  # as the fit is about to draw it
        data = unpack(rows[:n])
        model, _ = script.fit_ensemble(learner, data, updates, counted, args, generator)
        sets = {"rows": rows[holdout], "actions": others[numbers < n], "episodes": unseen}
        for (done, params), (name, part) in itertools.product(snapshots.items(), sets.items()):
            now = model | {"learner": {"params": params}, "elites": torch.arange(options.members)}
            each = errors_of(now, unpack(part), variances(data), script, args)
            place = key | {"transitions": n, "updates": done, "set": name}
            means = {"reward": each["error"][-1], "change": each["sampled"][:-1].nanmean()}
            means |= {"mean_change": each["error"][:-1].nanmean(), "nll": each["nll"].nanmean()}
            errors.append(place | {k: float(v) for k, v in means.items()})
            dimensions.append(pd.DataFrame({"dimension": names(env), **each}).assign(**place))
        snapshots.clear()
    return {"dimensions": pd.concat(dimensions).dropna(), "errors": pd.DataFrame(errors)}


def names(env: gym.Env) -> list[str]:
    """The dimensions of [s', r], by the task's names for parts of s, if it has any."""
    space = env.unwrapped.observation_space
    parts = space if isinstance(space, gym.spaces.Dict) else {"s": space}
    sizes = {name: int(np.prod(part.shape)) for name, part in parts.items()}
    return [f"{name}[{i}]" for name, size in sizes.items() for i in range(size)] + ["r"]


# --- Results --------------------------------------------------------------------------------------
def read(file: Path) -> pd.DataFrame:
    """A CSV file, or a table without rows."""
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEYS[file.stem])


def add(rows: pd.DataFrame, file: Path) -> None:
    """Adds rows to a CSV file, in the place of those of the same key, in one step."""
    table = pd.concat([part for part in (read(file), rows) if len(part)])
    table = table.drop_duplicates(KEYS[file.stem], keep="last").sort_values(KEYS[file.stem])
    table.to_csv(file.with_suffix(".tmp"), index=False, float_format="%.5g")
    file.with_suffix(".tmp").replace(file)


def tabulate(errors: pd.DataFrame) -> str:
    """Reward / change, means over seeds, a column for each cell and beta, in Markdown."""
    cell = errors.cell + np.where(errors.beta > 0, ", beta " + errors.beta.astype(str), "")
    rows = ["task", "data", "schedule", "members", "transitions", "updates", "set"]
    rows = [name for name in rows if name == "task" or errors[name].nunique() > 1]
    mean = errors.groupby([*rows, cell])[["reward", "change"]].mean().map("{:.3g}".format)
    return markdown((mean.reward + " / " + mean.change).unstack().fillna("").reset_index())


def draw(errors: pd.DataFrame, file: Path) -> None:
    """Errors by gradient steps, means over seeds."""
    errors = errors.melt(ROW, ["reward", "change"], "part", "error")
    curves = {"x": "updates", "y": "error", "hue": "cell", "style": "beta"}
    how = {"kind": "line", "errorbar": None, "facet_kws": {"sharey": False}, "height": 2.5}
    grid = sns.relplot(errors, row="part", col="task", **curves, **how)
    grid.set(xscale="log", yscale="log", xlabel="gradient steps").refline(y=1, lw=0.7)
    grid.set_titles("{row_name}, {col_name}").savefig(file, dpi=100)


def run(options: Options) -> None:
    """Makes the fits that are left to do, keeps each when finished, and presents all there are."""
    least = {"members": 1, "transitions": 10, "budgets": 1, "later": 1, "first": 1, "every": 1}
    for name, bound in (least | {"seeds": 0, "jobs": 1, "at": options.transitions}).items():
        value = getattr(options, name)
        if value is not None and min(np.atleast_1d(value), default=-1) < bound:
            raise InputError(f"--{name} must be at least {bound}")
    write()  # build/
    sets = [(task, None) for task in options.tasks]
    for folder in map(Path.resolve, options.checkpoints):
        saved = load_script("mbpo.py").read_checkpoint(folder)
        sets.append((saved["settings"]["env_id"], folder))
    for each in sets:
        collect(*each, 20)  # whether it can be measured at all
    for cell, beta in itertools.product(options.cells, options.betas):
        pose("", cell, beta, options.members, False)

    file = options.out / ("dimensions.csv" if options.dimensions else "errors.csv")
    done = {*read(file)[[*FIT, "updates", "transitions"]].itertuples(index=False, name=None)}
    schedule, _, places = plan(options)
    fits = []
    for each in itertools.product(sets, options.cells, options.betas, options.seeds):
        (task, folder), *rest = each
        key = task, folder.name if folder else "random", schedule, options.members, *rest
        if not {(*key, *place) for place in places.items()} <= done:
            fits.append((task, folder, *rest))
    options.out.mkdir(parents=True, exist_ok=True)
    pool = joblib.Parallel(options.jobs, return_as="generator_unordered")
    results = pool(joblib.delayed(fit)(*each, options) for each in fits)
    for tables in tqdm(results, total=len(fits), disable=None):
        for name in ["dimensions"] * options.dimensions + ["errors"]:
            add(tables[name], options.out / f"{name}.csv")

    errors = read(options.out / "errors.csv")
    asked = errors[errors.set == "actions"]
    (options.out / "tables.md").write_text(tabulate(errors) + "\n")
    (options.out / "summary.md").write_text(tabulate(asked) + "\n")
    print(tabulate(asked))
    if len(single := asked.query("schedule == 'one fit' and data == 'random'")):
        draw(single, options.out / "errors.png")


def scales(options: Scales) -> None:
    """Writes by task Var[s' - s], the mean over dimensions, over Var[r]; and rho.

    rho_i is the correlation of s_i and s'_i: its least, its median, and the share below 0.
    """
    table, script = [], load_script("mbpo.py")
    for task in options.tasks:
        env, rows = script.make_env(task), collect(task, None, options.transitions, 0, False)[0]
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        data = script.ReplayBuffer(1, *sizes, CPU).unpack(rows)
        *change, reward = variances(data).numpy()
        both = (x[:, np.isfinite(change)].numpy().T for x in (data.obs, data.next_obs))
        rho = np.array([np.corrcoef(s, after)[0, 1] for s, after in zip(*both, strict=True)])
        numbers = [np.nanmean(change) / reward, rho.min(), np.median(rho), (rho < 0).mean()]
        table.append([task, *numbers])
        print(*table[-1], flush=True)
    columns = ["task", "residual_over_reward", "rho_min", "rho_median", "rho_negative"]
    options.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(table, columns=columns).sort_values("task")
    table.to_csv(options.out / "scales.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    from mechanism import Options, Scales, run, scales  # by names that workers find

    tool = (scales, Scales) if sys.argv[1:2] == ["scales"] else (run, Options)
    run_tool(*tool, __doc__, sys.argv[1 + (tool[0] is scales) :])
