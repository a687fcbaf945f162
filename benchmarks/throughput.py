"""Updates and rollouts per second on this machine: ours beside those of other implementations.

    python benchmarks/throughput.py --only sac --peers sbx    SAC updates, beside sbx alone

Every turn is a process of its own. In every round all have one, so that whatever else the machine
does hits all alike. A peer that is not installed, or fails, is a line in the table that says why.
Written after every turn: cpu.csv or cuda.csv, a line per turn; .md from it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
from common import InputError, load_script, markdown, run_tool
from torch.utils.benchmark import Timer

KINDS = {"sac": "SAC updates", "model": "model updates", "rollout": "rollout transitions"}
OBS, ACTION = 24, 6  # numbers in the state and in the action, as of dmc/walker-run
PEERS = {"stable-baselines3": ("sac",), "sbx": ("sac",), "mbrl-lib": tuple(KINDS)}  # what they have
BATCH, UPDATES, FILLED, BRANCHES = 256, 20, 100_000, 400
NOTES = f"""\
States of {OBS} numbers, actions of {ACTION}, batches of {BATCH}. SAC: two hidden layers of 256.
Models: 7 members, four hidden layers of 200. Rollouts: {BRANCHES} branches of one step. Exact and
fast: --precision.
"""


class Sized(gym.Env):
    """An environment that has nothing but sizes."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)


def ours(who: str, kind: str, device: str) -> tuple:
    """What learn() does in mbpo_ftfl.py: the package, how much a call does, and what to call."""
    script, device = load_script("mbpo_ftfl.py"), torch.device(device)
    args = script.Args(device=device.type, precision=who.split()[-1])
    script.set_up_torch(args, device)
    how = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    agent = script.init_agent(OBS, ACTION, 1.0, device)
    ensemble = script.init_ensemble(7, OBS + ACTION, OBS + 1, args.model_hidden)
    learner = script.adam_init(ensemble, device)
    script.tree_map(torch._dynamo.mark_static_address, (agent, learner))
    buffer, synthetic = (script.ReplayBuffer(FILLED, OBS, ACTION, device) for _ in range(2))
    buffer.add(torch.randn(buffer.rows.shape, **how).clamp(-1, 1))
    update = script.compiled_update(script.sac_update, args)
    update_model = script.compiled_update(script.model_update, args)
    generator, data = how["generator"], buffer.unpack(buffer.rows[: 32 * BATCH])
    fit = partial(script.fit_ensemble, learner, data, 100, update_model, args, generator)

    def sac() -> None:
        rows = buffer.sample(UPDATES, BATCH, generator=generator)
        noise = torch.randn(UPDATES, 2, BATCH, ACTION, **how)
        for i in range(UPDATES):
            update(agent, buffer.unpack(rows[i]), noise[i])

    def rollout(model: dict, step, terminates) -> None:
        starts = buffer.unpack(buffer.sample(BRANCHES, generator=generator))
        given = model, agent["actor"]["params"], starts, 1
        synthetic.add(script.rollout(*given, step, terminates, generator))

    if kind != "rollout":
        return "torch", *((UPDATES, sac) if kind == "sac" else (100, fit))
    step = torch.compile(partial(script.model_step, args=args), fullgraph=True, dynamic=False)
    return "torch", BRANCHES, partial(rollout, fit()[0], step, script.termination_function(args))


def stable(who: str, kind: str, device: str) -> tuple:
    """SAC of stable-baselines3 and of sbx (JAX), which have one interface: train()."""
    os.environ["JAX_PLATFORMS"] = device
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes most of a GPU's memory
    from stable_baselines3.common.logger import configure

    sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "buffer_size": FILLED}
    sizes["device"] = "cpu" if who == "sbx" else device  # where torch is
    agent = import_module(who.replace("-", "_")).SAC("MlpPolicy", Sized(), **sizes)
    agent.set_logger(configure(None, []))
    buffer, random = agent.replay_buffer, np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        array[:] = random.standard_normal(array.shape, np.float32).clip(-1, 1)
    buffer.full = True
    train = partial(agent.train, gradient_steps=UPDATES, batch_size=BATCH)
    return "sbx-rl" if who == "sbx" else who, UPDATES, train


def mbrl_lib(who: str, kind: str, device: str) -> tuple:
    """mbrl-lib's SAC, ensemble and rollouts, called as in its mbpo.py, with the sizes of ours."""
    from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
    from mbrl.env.termination_fns import no_termination
    from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
    from mbrl.planning.sac_wrapper import SACAgent
    from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
    from mbrl.util import ReplayBuffer
    from mbrl.util.replay_buffer import BootstrapIterator

    def filled(n: int) -> ReplayBuffer:
        buffer, ends = ReplayBuffer(n, (OBS,), (ACTION,)), np.zeros(n, bool)
        random, shapes = np.random.default_rng(0), [(n, OBS), (n, ACTION), (n, OBS), n]
        parts = [random.standard_normal(shape, np.float32).clip(-1, 1) for shape in shapes]
        buffer.add_batch(*parts, ends, ends)
        return buffer

    env, device = Sized(), torch.device(device)
    args = {"gamma": 0.99, "tau": 0.005, "alpha": 0.2, "policy": "Gaussian", "lr": 3e-4}
    args |= {"target_update_interval": 1, "automatic_entropy_tuning": True, "hidden_size": 256}
    args |= {"target_entropy": -ACTION / 2, "device": device}
    agent = SAC(OBS, env.action_space, SimpleNamespace(**args))
    sizes = {"ensemble_size": 7, "num_layers": 4, "hid_size": 200}
    how = {"propagation_method": "random_model", "activation_fn_cfg": {"_target_": "torch.nn.SiLU"}}
    net = GaussianMLP(OBS + ACTION, OBS + 1, device, **sizes, **how)
    net = OneDTransitionRewardModel(net, target_is_delta=True, normalize=True, num_elites=5)
    memory = filled(32 * BATCH if kind == "model" else FILLED)
    net.update_normalizer(memory.get_all())
    net.set_elite(range(5))
    if kind == "sac":
        update = partial(agent.update_parameters, memory, BATCH, reverse_mask=True)
        return "mbrl", UPDATES, lambda: [update(updates=i) for i in range(UPDATES)]
    if kind == "model":
        batches = BootstrapIterator(memory.get_all(), BATCH, 7, shuffle_each_epoch=True)
        optimizer = ModelTrainer(net, optim_lr=1e-3, weight_decay=1e-5).optimizer
        return "mbrl", 32, lambda: [net.update(batch, optimizer) for batch in batches]
    given = ModelEnv(env, net, no_termination), memory, SACAgent(agent), filled(FILLED), True
    return "mbrl", BRANCHES, partial(rollout_model_and_populate_sac_buffer, *given, 1, BRANCHES)


def contend(who: str, kind: str, device: str, seconds: float) -> None:
    """Is a turn: makes ready, measures for so many seconds, prints version and rate in JSON."""
    sys.stdout = sys.stderr  # what libraries print is no answer
    make = {"stable-baselines3": stable, "sbx": stable, "mbrl-lib": mbrl_lib}.get(who, ours)
    package, amount, once = make(who, kind, device)
    once()
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    rate = amount / timer.blocked_autorange(min_run_time=seconds).median
    answer = {"version": metadata.version(package), "rate": rate}
    print(json.dumps(answer), file=sys.__stdout__)


@dataclass
class Options:
    rounds: int = 3  # rounds, in each of which all have a turn
    seconds: float = 5.0  # seconds of a turn at least
    threads: int = 1  # CPU threads
    only: tuple[Literal[tuple(KINDS)], ...] = tuple(KINDS)  # what is measured
    peers: tuple[Literal[tuple(PEERS)], ...] = tuple(PEERS)  # beside whom
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where
    out: Path = Path(__file__).with_name("results") / "throughput"  # folder of the results


def plan(options: Options) -> list[tuple]:
    """Who and kind of each turn; the first of a kind is ours."""
    peers = {name: PEERS[name] for name in options.peers}
    offers = {"ours, exact": tuple(KINDS), "ours, fast": tuple(KINDS)} | peers
    return [(who, kind) for kind in options.only for who in offers if kind in offers[who]]


def measure(options: Options) -> None:
    """Measures round by round, and writes all files after each."""
    if options.rounds < 1 or options.seconds < 0 or options.threads < 1:
        raise InputError("--rounds and --threads must be at least 1, --seconds 0 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    device = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else "CPU with " + torch.backends.cpu.get_cpu_capability()
    )
    title = f"**{device}, threads: {options.threads}, torch {torch.__version__}**"
    records = []
    for number, (who, kind) in product(range(options.rounds), plan(options)):
        given = json.dumps([who, kind, options.device, options.seconds])
        command = [sys.executable, __file__, "contend", given]
        turn = subprocess.run(command, capture_output=True, text=True)
        said = (turn.stderr.strip() or "it ended without a word").splitlines()[-1]
        answer = {"version": "", "rate": float("nan"), "error": said}
        answer = json.loads(turn.stdout) | {"error": ""} if turn.stdout else answer
        records.append({"round": number, "kind": kind, "who": who} | answer)
        text = f"{title}\n\n{write(records, options.out / f'{options.device}.csv')}\n\n{NOTES}"
        (options.out / f"{options.device}.md").write_text(text)
    print(text)


def write(records: list[dict], file: Path) -> str:
    """Writes a CSV of the turns; returns a table of rates: median and range over rounds."""
    frame = pd.DataFrame(records)
    frame.to_csv(file, index=False, float_format="%.6g")
    parts = frame.replace({"kind": KINDS}).groupby(["kind", "who"], sort=False)
    spread = parts.rate.agg(["median", "min", "max"]).rename(columns={"median": "per second"})
    return markdown(
        parts.version.last().to_frame().join(spread).join(parts.error.last()).reset_index()
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["contend"]:
        contend(*json.loads(sys.argv[2]))
    else:
        run_tool(measure, Options, __doc__)
