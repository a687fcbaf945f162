"""Updates and rollouts per second on this machine: ours beside those of other implementations.

    python benchmarks/throughput.py --only sac --peers sbx    SAC updates, beside sbx alone

Every turn is a process of its own, on as many cores as threads. In every round all have one. A peer
that is not installed, or fails, is a line in the table that says why.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from common import RESULTS, InputError, load_script, markdown, run_tool
from torch.utils.benchmark import Timer

KINDS = {"sac": "SAC updates", "model": "model updates", "rollout": "rollout transitions"}
OBS, ACTION = 24, 6  # numbers in the state and in the action, as of dmc/walker-run
BATCH, UPDATES, FILLED, BRANCHES = 256, 20, 100_000, 400
NOTES = f"""\
States of {OBS} numbers, actions of {ACTION}, batches of {BATCH}. SAC: two hidden layers of 256.
Models: 7 members, four of 200. Rollouts: {BRANCHES} branches of a step. Exact, fast: --precision.
"""


class Sized(gym.Env):
    """An environment that has nothing but sizes."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)


def ours(who: str, kind: str, device: str) -> tuple:
    """What learn() does in mbpo_ftfl.py: how much a call does, and what to call."""
    script, device = load_script("mbpo_ftfl.py"), torch.device(device)
    args = script.Args(device=device.type, precision=who.split()[-1])
    script.set_up_torch(args, device)
    generator = torch.Generator(device).manual_seed(0)
    agent = script.init_agent(OBS, ACTION, 1.0, device)
    learner = script.adam_init(script.init_ensemble(7, OBS + ACTION, OBS + 1, 200), device)
    script.tree_map(torch._dynamo.mark_static_address, (agent, learner))
    buffer = script.ReplayBuffer(FILLED, OBS, ACTION, device)
    buffer.add(2 * torch.rand(buffer.rows.shape, device=device) - 1)
    update = script.compiled_update(script.sac_update, args)
    update_model = script.compiled_update(script.model_update, args)
    data = buffer.unpack(buffer.rows[: 32 * BATCH])
    fit = partial(script.fit_ensemble, learner, data, 100, update_model, args, generator)
    step = torch.compile(partial(script.model_step, args=args), fullgraph=True, dynamic=False)
    model = fit()[0] if kind == "rollout" else None

    def sac() -> None:
        rows = buffer.sample(UPDATES, BATCH, generator=generator)
        noise = torch.randn(UPDATES, 2, BATCH, ACTION, device=device)
        for i in range(UPDATES):
            update(agent, buffer.unpack(rows[i]), noise[i])

    def rollout() -> None:
        starts = buffer.unpack(buffer.sample(BRANCHES, generator=generator))
        how = step, script.termination_function(args), generator
        buffer.add(script.rollout(model, agent["actor"]["params"], starts, 1, *how))

    return {"sac": (UPDATES, sac), "model": (100, fit), "rollout": (BRANCHES, rollout)}[kind]


def stable(who: str, kind: str, device: str) -> tuple:
    """SAC of stable-baselines3 and of sbx (JAX), which have one interface: train()."""
    os.environ.update(JAX_PLATFORMS=device, XLA_PYTHON_CLIENT_PREALLOCATE="false")  # lean on a GPU
    from stable_baselines3.common.logger import configure

    sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "buffer_size": FILLED}
    sizes["device"] = "cpu" if who == "sbx" else device  # where torch is
    agent = import_module(who.replace("-", "_")).SAC("MlpPolicy", Sized(), **sizes)
    agent.set_logger(configure(None, []))
    buffer, random = agent.replay_buffer, np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        array[:] = random.standard_normal(array.shape, np.float32).clip(-1, 1)
    buffer.full = True
    return UPDATES, partial(agent.train, gradient_steps=UPDATES, batch_size=BATCH)


def mbrl_lib(who: str, kind: str, device: str) -> tuple:
    """mbrl-lib's SAC, ensemble and rollouts, called as in its mbpo.py, with the sizes of ours."""
    from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
    from mbrl.env.termination_fns import no_termination
    from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
    from mbrl.planning.sac_wrapper import SACAgent
    from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
    from mbrl.util.replay_buffer import BootstrapIterator, ReplayBuffer

    def filled(n: int) -> ReplayBuffer:
        buffer, ends = ReplayBuffer(n, (OBS,), (ACTION,)), np.zeros(n, bool)
        random, shapes = np.random.default_rng(0), [(n, OBS), (n, ACTION), (n, OBS), n]
        parts = [random.standard_normal(shape, np.float32).clip(-1, 1) for shape in shapes]
        buffer.add_batch(*parts, ends, ends)
        return buffer

    device = torch.device(device)
    args = {"gamma": 0.99, "tau": 0.005, "alpha": 0.2, "policy": "Gaussian", "lr": 3e-4}
    args |= {"target_update_interval": 1, "automatic_entropy_tuning": True, "hidden_size": 256}
    args |= {"target_entropy": -ACTION / 2, "device": device}
    agent = SAC(OBS, Sized.action_space, SimpleNamespace(**args))
    sizes = {"ensemble_size": 7, "num_layers": 4, "hid_size": 200}
    how = {"propagation_method": "random_model", "activation_fn_cfg": {"_target_": "torch.nn.SiLU"}}
    net = GaussianMLP(OBS + ACTION, OBS + 1, device, **sizes, **how)
    net = OneDTransitionRewardModel(net, target_is_delta=True, normalize=True, num_elites=5)
    memory = filled(32 * BATCH if kind == "model" else FILLED)
    net.update_normalizer(memory.get_all())
    net.set_elite(range(5))
    if kind == "sac":
        update = partial(agent.update_parameters, memory, BATCH, reverse_mask=True)
        return UPDATES, lambda: [update(updates=i) for i in range(UPDATES)]
    if kind == "model":
        batches = BootstrapIterator(memory.get_all(), BATCH, 7, shuffle_each_epoch=True)
        optimizer = ModelTrainer(net, optim_lr=1e-3, weight_decay=1e-5).optimizer
        return 32, lambda: [net.update(batch, optimizer) for batch in batches]
    given = ModelEnv(Sized(), net, no_termination), memory, SACAgent(agent), filled(FILLED), True
    return BRANCHES, partial(rollout_model_and_populate_sac_buffer, *given, 1, BRANCHES)


CONTENDERS = {  # what makes each ready, its package, and what can be measured of it
    "ours, exact": (ours, "torch", KINDS),
    "ours, fast": (ours, "torch", KINDS),
    "stable-baselines3": (stable, "stable-baselines3", ["sac"]),
    "sbx": (stable, "sbx-rl", ["sac"]),
    "mbrl-lib": (mbrl_lib, "mbrl", KINDS),
}
OURS, PEERS = tuple(CONTENDERS)[:2], tuple(CONTENDERS)[2:]


def take_turn(who: str, kind: str, device: str, seconds: float) -> dict:
    """Makes ready, measures for so many seconds, and returns version and rate."""
    if hasattr(os, "sched_setaffinity"):  # JAX asks for it
        os.sched_setaffinity(0, range(torch.get_num_threads()))
    make, package, _ = CONTENDERS[who]
    amount, once = make(who, kind, device)
    once()
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    rate = amount / timer.blocked_autorange(min_run_time=seconds).median
    return {"version": metadata.version(package), "rate": rate, "error": ""}


@dataclass
class Options:
    rounds: int = 3  # rounds, in each of which all have a turn
    seconds: float = 5.0  # seconds of a turn at least
    threads: int = 1  # CPU threads
    only: tuple[Literal[tuple(KINDS)], ...] = tuple(KINDS)  # what is measured
    peers: tuple[Literal[PEERS], ...] = PEERS  # beside whom
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where
    out: Path = RESULTS / "throughput"  # folder of the results


def measure(options: Options) -> None:
    """Measures round by round, and writes all files after each turn, a process of its own."""
    if options.rounds < 1 or options.seconds < 0 or options.threads < 1:
        raise InputError("--rounds and --threads must be at least 1, --seconds 0 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    cpu = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu
    title = f"**{device}, threads: {options.threads}, torch {torch.__version__}**"
    names = [(who, CONTENDERS[who][2]) for who in (*OURS, *options.peers)]
    turns = [(who, kind) for kind in options.only for who, kinds in names if kind in kinds]
    records, file = [], options.out / f"{options.device}.csv"
    for number, turn in product(range(options.rounds), turns):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                answer = process.submit(take_turn, *turn, options.device, options.seconds).result()
            except Exception as error:  # of a library
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                answer = {"version": "", "rate": float("nan"), "error": said}
        records.append({"round": number, "kind": turn[1], "who": turn[0]} | answer)
        frame = pd.DataFrame(records)
        frame.to_csv(file, index=False, float_format="%.6g")
        parts = frame.replace({"kind": KINDS}).groupby(["kind", "who"], sort=False)
        spread = parts.rate.agg(["median", "min", "max"]).rename(columns={"median": "per second"})
        table = parts[["version"]].last().join(spread).join(parts.error.last()).reset_index()
        file.with_suffix(".md").write_text(f"{title}\n\n{markdown(table)}\n\n{NOTES}")
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    run_tool(measure, Options, __doc__)
