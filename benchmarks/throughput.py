"""Updates and rollouts per second on this machine: ours beside those of other implementations.

    python benchmarks/throughput.py --only sac --peers sbx    SAC updates, beside sbx alone
    python benchmarks/throughput.py --pythons sbx ~/sbx/bin/python mbrl-lib ~/mbrl/bin/python

Every contender is a process of its own, idle but in its turn; in every round all have one, so that
whatever else the machine does hits all alike. A peer runs in this Python or in another, which needs
nothing but the peer; one that is not installed there, or fails, is a line in the table that says
why. Written after every round: cpu.csv or cuda.csv, a line per turn; .md from it.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch

KINDS = {"sac": "SAC updates", "model": "model updates", "rollout": "rollout transitions"}
SIZES = {"dmc/walker-run": (24, 6), "dmc/humanoid-walk": (67, 21)}  # numbers in state and action
PEERS = {"stable-baselines3": ("sac",), "sbx": ("sac",), "mbrl-lib": tuple(KINDS)}  # what they have
BATCH, UPDATES, FILLED, BRANCHES = 256, 20, 100_000, 400
NOTES = f"""\
SAC: batches of {BATCH}, two hidden layers of 256. Models: 7 members, four hidden layers of 200,
batches of {BATCH}. Rollouts: {BRANCHES} branches of one step. Exact and fast: --precision.
"""


class Sized(gym.Env):
    """An environment that has nothing but the sizes asked for."""

    def __init__(self, obs: int, action: int):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (action,), np.float32)


def ours(who: str, kind: str, obs: int, action: int, device: str) -> tuple:
    """What learn() does in mbpo_ftfl.py: the package, how much a call does, and what to call."""
    from common import load_script

    script, device = load_script("mbpo_ftfl.py"), torch.device(device)
    args = script.Args(device=device.type, precision=who.split()[-1])
    script.set_up_torch(args, device)
    how = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    agent = script.init_agent(obs, action, 1.0, device)
    ensemble = script.init_ensemble(7, obs + action, obs + 1, args.model_hidden)
    learner = script.adam_init(ensemble, device)
    script.tree_map(torch._dynamo.mark_static_address, (agent, learner))
    buffer, synthetic = (script.ReplayBuffer(FILLED, obs, action, device) for _ in range(2))
    buffer.add(torch.randn(buffer.rows.shape, **how).clamp(-1, 1))
    update = script.compiled_update(script.sac_update, args)
    update_model = script.compiled_update(script.model_update, args)
    generator, data = how["generator"], buffer.unpack(buffer.rows[: 32 * BATCH])
    fit = partial(script.fit_ensemble, learner, data, 100, update_model, args, generator)

    def sac() -> None:
        rows = buffer.sample(UPDATES, BATCH, generator=generator)
        noise = torch.randn(UPDATES, 2, BATCH, action, **how)
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


def stable(who: str, kind: str, obs: int, action: int, device: str) -> tuple:
    """SAC of stable-baselines3 and of sbx (JAX), which have one interface: train()."""
    os.environ["JAX_PLATFORMS"] = device
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # or JAX takes most of a GPU's memory
    from stable_baselines3.common.logger import configure

    sizes = {"policy_kwargs": {"net_arch": [256, 256]}, "buffer_size": FILLED}
    sizes["device"] = "cpu" if who == "sbx" else device  # where torch is
    agent = import_module(who.replace("-", "_")).SAC("MlpPolicy", Sized(obs, action), **sizes)
    agent.set_logger(configure(None, []))
    buffer, random = agent.replay_buffer, np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        array[:] = random.standard_normal(array.shape, np.float32).clip(-1, 1)
    buffer.full = True
    train = partial(agent.train, gradient_steps=UPDATES, batch_size=BATCH)
    return "sbx-rl" if who == "sbx" else who, UPDATES, train


def mbrl_lib(who: str, kind: str, obs: int, action: int, device: str) -> tuple:
    """mbrl-lib's SAC, ensemble and rollouts, called as in its mbpo.py, with the sizes of ours."""
    from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
    from mbrl.env.termination_fns import no_termination
    from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
    from mbrl.planning.sac_wrapper import SACAgent
    from mbrl.third_party.pytorch_sac_pranz24.sac import SAC
    from mbrl.util import ReplayBuffer
    from mbrl.util.replay_buffer import BootstrapIterator

    def filled(n: int) -> ReplayBuffer:
        buffer, ends = ReplayBuffer(n, (obs,), (action,)), np.zeros(n, bool)
        random, shapes = np.random.default_rng(0), [(n, obs), (n, action), (n, obs), n]
        parts = [random.standard_normal(shape, np.float32).clip(-1, 1) for shape in shapes]
        buffer.add_batch(*parts, ends, ends)
        return buffer

    env, device = Sized(obs, action), torch.device(device)
    args = {"gamma": 0.99, "tau": 0.005, "alpha": 0.2, "policy": "Gaussian", "lr": 3e-4}
    args |= {"target_update_interval": 1, "automatic_entropy_tuning": True, "hidden_size": 256}
    args |= {"target_entropy": -action / 2, "device": device}
    agent = SAC(obs, env.action_space, SimpleNamespace(**args))
    sizes = {"ensemble_size": 7, "num_layers": 4, "hid_size": 200}
    how = {"propagation_method": "random_model", "activation_fn_cfg": {"_target_": "torch.nn.SiLU"}}
    net = GaussianMLP(obs + action, obs + 1, device, **sizes, **how)
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


def contend(who: str, kind: str, *setting) -> None:
    """Is a contender: answers every line on stdin, seconds, with version and rate, in JSON."""
    from torch.utils.benchmark import Timer

    sys.stdout = sys.stderr  # what libraries print is no answer
    made = {"stable-baselines3": stable, "sbx": stable, "mbrl-lib": mbrl_lib}.get(who, ours)
    package, amount, once = made(who, kind, *setting)
    timer = Timer("once()", globals={"once": once}, num_threads=torch.get_num_threads())
    for seconds in sys.stdin:
        rate = amount / timer.blocked_autorange(min_run_time=float(seconds)).mean
        answer = {"version": metadata.version(package), "rate": rate}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


@dataclass
class Options:
    rounds: int = 7  # rounds, in each of which all have a turn
    seconds: float = 3.0  # seconds of a turn at least
    threads: int = 2  # CPU threads of each contender
    only: tuple[Literal[tuple(KINDS)], ...] = tuple(KINDS)  # what is measured
    peers: tuple[Literal[tuple(PEERS)], ...] = tuple(PEERS)  # beside whom
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where
    out: Path = Path(__file__).with_name("results") / "throughput"  # folder of the results
    pythons: dict[Literal[tuple(PEERS)], str] = field(default_factory=dict)  # of peers


class Contender(subprocess.Popen):
    """The process of a contender, by its turn (see plan); it has made ready once it is here."""

    def __init__(self, options: Options, turn: tuple):
        who, kind, task = turn
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        given = json.dumps([who, kind, *SIZES[task], options.device])
        command = [options.pythons.get(who, sys.executable), __file__, "contend", given]
        super().__init__(command, bufsize=0, **pipes)
        self.ask(0)

    def ask(self, seconds: float) -> dict:
        """Version and rate, after a turn of so many seconds; if it has ended, why, as error."""
        with suppress(BrokenPipeError):
            self.stdin.write(f"{seconds}\n".encode())
        if line := self.stdout.readline():
            return json.loads(line)
        self.log.seek(0)
        return {"error": (self.log.read().strip() or "it ended without a word").splitlines()[-1]}


def plan(options: Options) -> list[tuple]:
    """Who, kind and task of each contender, in the order of turns; the first of a kind is ours."""
    peers = {name: PEERS[name] for name in options.peers}
    offers = {"ours, exact": tuple(KINDS), "ours, fast": tuple(KINDS)} | peers
    tasks = [(kind, task) for kind in options.only for task in SIZES]
    return [(who, kind, task) for kind, task in tasks for who in offers if kind in offers[who]]


def measure(options: Options) -> None:
    """Gets everyone ready, then measures round by round; writes all files after each."""
    from common import InputError

    if options.rounds < 1 or options.seconds < 0 or options.threads < 1:
        raise InputError("--rounds and --threads must be at least 1, --seconds 0 or more")
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    turns, records = plan(options), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # as many at a time as there are cores
        contenders = [*pool.map(partial(Contender, options), turns)]
    for number in range(1, options.rounds + 1):
        for (who, kind, task), contender in zip(turns, contenders, strict=True):
            names = {"round": number, "kind": kind, "task": task, "who": who}
            names |= {"version": "", "rate": float("nan"), "error": ""}
            records.append(names | contender.ask(options.seconds))
        device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
        text = f"**{device}, threads: {options.threads}, torch {torch.__version__}**, {number} "
        text += f"rounds of {options.seconds:g} s each\n\n"
        text += write(records, options.out / f"{options.device}.csv") + f"\n\n{NOTES}"
        (options.out / f"{options.device}.md").write_text(text)
    print(text)
    for contender in contenders:
        contender.communicate()


def write(records: list[dict], file: Path) -> str:
    """Writes a CSV; returns rates in Markdown, and the first of a kind's over them, by round."""
    import pandas as pd
    from common import markdown

    frame = pd.DataFrame(records)
    frame.to_csv(file, index=False, float_format="%.6g")
    rates = frame.groupby(["round", "kind", "task"]).rate
    frame = frame.assign(ratio=rates.transform(lambda x: x.iloc[0]) / frame.rate)
    parts = frame.replace({"kind": KINDS}).groupby(["kind", "task", "who"], sort=False)
    spread = parts[["rate", "ratio"]].agg(["median", "min", "max"])
    spread.columns = ["per second", "min", "max", f"{frame.who[0]} over it", "its min", "its max"]
    return markdown(parts[["version"]].last().join(spread).join(parts.error.last()).reset_index())


if __name__ == "__main__":
    if sys.argv[1:2] == ["contend"]:  # perhaps in a peer's Python, which has nothing of ours
        contend(*json.loads(sys.argv[2]))
    else:
        from common import run_tool

        run_tool(measure, Options, __doc__)
