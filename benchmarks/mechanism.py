"""How wrong a model is where MBPO asks it: at states of the data, with actions the data lack.

    python benchmarks/mechanism.py                  one fit, by gradient steps
    python benchmarks/mechanism.py --later 500      and later fits, while the data grow
    python benchmarks/mechanism.py scales           variances of s' - s and r, on fifteen tasks

A rollout starts at a state s of the replay buffer and takes a new action a. Its error is measured
exactly: set the simulator to s, take a, compare. Data: N transitions by a uniform random policy, or
by a run's own (--checkpoints). An ensemble of E members learns from them by the scripts' functions.
Errors are measured on `rows`, which the fit holds out at random; on `actions`, the states of 2 in 5
rows, each with a new action; and on `episodes`, 5,000 rows of other episodes.

Member e predicts y = [s', r] with mean mu_e and deviation sigma_e; v are the variances of s' - s
and r over the data. With means E over members and transitions, and then over dimensions i, without
those in which s' - s never varies (if r never does, the reward's error is nan):

    reward        E[(mu_e - r)^2] / v_r                             1: no better than the mean
    change        E[(mu_e - s')_i^2 + sigma_e,i^2] / v_i            1: no better than s + the mean
    mean_change   E[(mu_e - s')_i^2] / v_i                          of means; rollouts take samples
    nll           E[(mu_e - y)_i^2 / sigma_e,i^2 + log(sigma_e,i^2 / v_i)]

A task is refused if an action, taken again from its simulator state, leads elsewhere. A cell may be
a command line: --cells "mbpo_ftfl --model-lr 3e-4". Fits are kept in OUT/errors.csv.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import gymnasium as gym
import joblib
import mujoco
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from common import RESULTS, InputError, load_script, markdown, parse, run_tool
from diffs import write
from torch.utils._pytree import tree_map
from tqdm import tqdm

TASKS = "dmc/walker-run dmc/humanoid-stand dmc/quadruped-walk dmc/hopper-stand dmc/finger-spin"
FIFTEEN = """dmc/hopper-hop dmc/hopper-stand dmc/humanoid-stand dmc/humanoid-walk dmc/humanoid-run
dmc/quadruped-run dmc/quadruped-walk dmc/walker-run dmc/cheetah-run dmc/cartpole-swingup
Hopper-v5 Walker2d-v5 HalfCheetah-v5 Ant-v5 Humanoid-v5"""
CELLS = {  # name: script and options
    "raw s' - s": "mbpo",
    "raw s'": "mbpo_residual_ablation --no-normalize-targets --no-predict-residual",
    "unit s' - s": "mbpo_residual_ablation",
    "unit s'": "mbpo_ftfl",
    "ridge": "build/mbpo_ftfl_ridge",
}
FIT = ["task", "data", "schedule", "members", "cell", "beta", "seed"]  # which fit it is
PLACE = ["transitions", "updates", "set"]  # and where it is measured


@dataclass
class Options:
    tasks: tuple[str, ...] = (*TASKS.split(), "HalfCheetah-v5")  # with a uniform random policy
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
    dimensions: bool = False  # write each dimension's share, too: OUT/dimensions.csv
    shown: tuple[int, ...] = ()  # gradient steps to show in the table; by default all
    jobs: int = 2  # fits at a time, one process with one thread each
    compile: bool = True  # compile the update with torch.compile
    out: Path = RESULTS / "mechanism"  # folder of the results


def simulator(env: gym.Env) -> list:
    """mjModel and mjData of a task of dm_control or Gymnasium."""
    physics = getattr(env.unwrapped, "physics", env.unwrapped)
    if not hasattr(physics, "data"):
        raise InputError(f"{env.spec.id} can't be measured: it is no task of MuJoCo")
    return [getattr(part, "ptr", part) for part in (physics.model, physics.data)]


@lru_cache(maxsize=2)  # the fits to one data set come one after another
def collect(task: str, run: Path | None, n: int, seed: int = 0, asked: bool = True) -> list:
    """Rows [N, 2S + A + 2] and, if asked, those of new actions [M, 2S + A + 2], in float64."""
    script = load_script("mbpo.py")
    env, sim = script.make_env(task), script.make_env(task)
    A = env.action_space.shape[0]
    act = script.load_policy(run, sampled=True) if run else lambda _: 2 * torch.rand(A).numpy() - 1
    torch.manual_seed(seed)  # of all actions
    rows, others, over, sim_over = [], [], True, True

    def step(env: gym.Env, action: np.ndarray) -> tuple[np.ndarray, bool]:
        after, reward, terminated, truncated, _ = env.step(action)
        return np.hstack([obs, action, reward, after, terminated]), terminated or truncated

    for t in range(n):
        if over:
            obs, _ = env.reset(seed=script.derive_seed(seed, t))
        action, again = act(obs), None
        if asked and t % 5 < 2:
            for a in (act(obs), action):
                if sim_over:  # by its own clock
                    sim.reset(seed=0)
                mujoco.mj_copyData(simulator(sim)[1], *simulator(env))
                other, (again, sim_over) = again, step(sim, a)
            others.append(other)
        row, over = step(env, action)
        if again is not None and not np.allclose(again, row, rtol=1e-6, atol=1e-6):
            gap = f"an action taken again gives another s' or r, by {np.abs(again - row).max():.2g}"
            raise InputError(f"{task} can't be measured: {gap}; it has state outside mjData")
        rows.append(row)
        obs = row[-1 - len(obs) : -1]
    return [torch.as_tensor(np.array(part)) for part in (rows, others)]


@lru_cache(maxsize=1)  # what is compiled serves the seeds of a fit
def pose(task: str, cell: str, beta: float, members: int, compile: bool) -> tuple:
    """A cell's script, as a module; its arguments; its update(learner, x, y) -> loss, in place."""
    name, *words = shlex.split(CELLS.get(cell, cell)) or [""]
    script = load_script(f"{name}.py")
    args = parse(script.Args, "a cell's script", [*words, "--model-beta", str(beta)])
    args = replace(args, ensemble_size=members, num_elites=members, device="cpu", compile=compile)
    script.set_up_torch(script.check_args(args), "cpu")
    return script, args, script.compiled_update(script.model_update, args)


def plan(options: Options) -> tuple[str, list, dict]:
    """Name; fits (transitions, gradient steps); {steps in all: transitions} of measures."""
    n, first, later, every = options.transitions, options.first, options.later, options.every
    if later is None:
        return "one fit", [(n, max(options.budgets))], dict.fromkeys(options.budgets, n)
    sizes = range(n, max(options.at) + 1, every)
    fits = [(size, later if i else first) for i, size in enumerate(sizes)]
    places = {first + i * later: size for i, size in enumerate(sizes) if size in options.at}
    return f"{first}, {later} every {every}", fits, places


def measure(model: dict, batch, data, script, args) -> pd.DataFrame:
    """By dimension [S + 1] error, spread, nll on a batch, in units of all data's v; data's rho."""
    y, known = (torch.cat([b.next_obs - b.obs, b.reward[:, None]], -1) for b in (batch, data))
    v = known.double().var(0, correction=0)
    v = v.where(v > 1e-24, torch.nan)
    mean, std = (x.double() for x in script.predict(model, batch.obs, batch.action, args))
    mean[..., :-1] -= batch.obs
    error, spread = (mean - y) ** 2, std**2  # [E, B, S + 1]
    parts = {"error": error / v, "spread": spread / v, "nll": error / spread + (spread / v).log()}
    rho = pd.DataFrame(data.obs.numpy()).corrwith(pd.DataFrame(data.next_obs.numpy()))
    return pd.DataFrame({name: part.mean((0, 1)) for name, part in parts.items()}).assign(rho=rho)


def fit(key: tuple, run: Path | None, options: Options) -> dict:
    """All fits of an ensemble, in a worker: its rows of each CSV file."""
    torch.set_num_threads(1)
    (task, _, _, members, cell, beta, seed), (_, fits, places) = key, plan(options)
    rows, others = (part.float() for part in collect(task, run, fits[-1][0]))
    unseen = collect(task, run, 5000, 1, False)[0].float()
    script, args, update = pose(task, cell, beta, members, options.compile)
    env = script.make_env(task)
    S, A = env.observation_space.shape[0], env.action_space.shape[0]
    parts = getattr(env.unwrapped.observation_space, "spaces", {"s": env.observation_space})
    names = [f"{k}[{i}]" for k, v in parts.items() for i in range(int(np.prod(v.shape)))] + ["r"]
    unpack = script.ReplayBuffer(1, S, A, "cpu").unpack
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for the initial weights
    params = script.init_ensemble(members, S + A, S + 1, args.model_hidden)
    learner, everyone = script.adam_init(params, "cpu"), torch.arange(members)
    snapshots, errors, dimensions = {}, [], []

    def counted(learner: dict, *batch: torch.Tensor) -> torch.Tensor:
        loss = update(learner, *batch)
        if (done := int(learner["t"])) in places:
            snapshots[done] = tree_map(torch.clone, learner["params"])
        return loss

    for n, updates in fits:
        _, holdout = script.split(n, args, generator.clone_state())  # as the fit will draw it
        data = unpack(rows[:n])
        model, _ = script.fit_ensemble(learner, data, updates, counted, args, generator)
        sets = {"rows": rows[holdout], "actions": others[: 2 * n // 5], "episodes": unseen}
        for (done, params), (name, part) in product(snapshots.items(), sets.items()):
            now = model | {"learner": {"params": params}, "elites": everyone}
            row = dict(zip([*FIT, *PLACE], [*key, n, done, name], strict=True))
            each = measure(now, unpack(part), data, script, args)
            shares = pd.DataFrame({**row, "dimension": names, **each})
            dimensions.append(shares.dropna(subset="error"))
            row |= {"reward": each.error.iloc[-1], "change": (each.error + each.spread)[:-1].mean()}
            errors.append(row | {"mean_change": each.error[:-1].mean(), "nll": each.nll.mean()})
        snapshots.clear()
    return {"dimensions": pd.concat(dimensions), "errors": pd.DataFrame(errors)}


def present(errors: pd.DataFrame, options: Options) -> None:
    """Tables of reward / change, of tasks that a budget serves, and curves; means over seeds."""
    shown = errors[errors.set == "actions"]
    rows = ["task", *(x for x in [*FIT[1:4], PLACE[0]] if shown[x].nunique() > 1), "updates"]
    cell = shown.cell + np.where(shown.beta > 0, ", beta " + shown.beta.astype(str), "")
    mean = shown.groupby([*rows, cell])[["reward", "change"]].mean()
    words = mean.map("{:.3g}".format)
    words = words[words.index.isin(options.shown, "updates")] if options.shown else words
    best = mean.groupby([name for name in mean.index.names if name != "updates"]).transform("min")
    good = ((mean <= 1.25 * best) | best.isna()).all(axis=1).groupby(["cell", "updates"])
    table = (words.reward + " / " + words.change).unstack().fillna("")
    rule = (good.sum().astype(str) + " of " + good.count().astype(str)).unstack().fillna("")
    order = sorted(table, key=lambda name: [name.partition(", beta")[0] != x for x in CELLS])
    for name, part in {"table": table[order], "rule": rule.loc[order]}.items():
        text = markdown(part.reset_index())
        (options.out / f"{name}.md").write_text(f"{text}\n")
        print(f"{text}\n")
    lines = shown[(shown.schedule == "one fit") & (shown.data == "random")]
    lines = lines[(lines.members == options.members) & (lines.transitions == options.transitions)]
    if len(lines):
        lines = lines.melt([*FIT, *PLACE], ["reward", "change"], "part", "error")
        curves = {"x": "updates", "y": "error", "hue": "cell", "style": "beta"}
        how = {"kind": "line", "errorbar": None, "facet_kws": {"sharey": False}, "height": 3}
        grid = sns.relplot(lines, row="part", col="task", **curves, **how)
        grid.set(xscale="log", yscale="log", xlabel="gradient steps").refline(y=1, lw=0.7)
        grid.tick_params(which="minor", labelbottom=False)
        grid.set_titles("{row_name}, {col_name}").savefig(options.out / "errors.png", dpi=100)


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
        sets += [(load_script("mbpo.py").read_checkpoint(folder)["settings"]["env_id"], folder)]
    for each in sets:
        collect(*each, 20)  # whether it can be measured at all
    for cell, beta in product(options.cells, options.betas):
        pose("", cell, beta, options.members, False)

    file = options.out / f"{'dimensions' if options.dimensions else 'errors'}.csv"
    held = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*FIT, *PLACE])
    done = {*held[[*FIT, "updates", "transitions"]].itertuples(index=False, name=None)}
    (schedule, _, places), fits = plan(options), []
    for (task, folder), *rest in product(sets, options.cells, options.betas, options.seeds):
        key = task, folder.name if folder else "random", schedule, options.members, *rest
        if not {(*key, *place) for place in places.items()} <= done:
            fits.append(joblib.delayed(fit)(key, folder, options))
    if not fits and held.empty:
        raise InputError("nothing to do: name a task or a run folder, cells, betas and seeds")
    options.out.mkdir(parents=True, exist_ok=True)
    results = joblib.Parallel(options.jobs, return_as="generator_unordered")(fits)
    for tables in tqdm(results, total=len(fits), disable=None):
        for name in ["dimensions"] * options.dimensions + ["errors"]:
            file, table = options.out / f"{name}.csv", tables[name]
            table.to_csv(file, mode="a", header=not file.exists(), index=False, float_format="%.5g")
    errors = pd.read_csv(options.out / "errors.csv").drop_duplicates([*FIT, *PLACE], keep="last")
    present(errors, options)


def scales(options: Options) -> None:
    """Writes Var[s' - s], the mean over dimensions that vary, over Var[r], of random actions."""
    table = {}
    for task in options.tasks:
        rows = collect(task, None, options.transitions, 0, False)[0].numpy()
        S = load_script("mbpo.py").make_env(task).observation_space.shape[0]
        change = (rows[:, -1 - S : -1] - rows[:, :S]).var(0)
        table[task] = change[change > 1e-24].mean() / rows[:, -2 - S].var()
    options.out.mkdir(parents=True, exist_ok=True)
    table = pd.Series(table, name="residual_over_reward").rename_axis("task")
    table.to_csv(options.out / "scales.csv", float_format="%.5g")


if __name__ == "__main__":
    from mechanism import Options, run, scales  # by names that workers find

    scale = sys.argv[1:2] == ["scales"]
    given = Options(tasks=(*FIFTEEN.split(),), transitions=20_000) if scale else Options()
    run_tool(scales if scale else run, Options, __doc__, sys.argv[1 + scale :], default=given)
