"""Our updates and rollouts as train() compiles them, whole runs of train(), and the products alone.

Nothing is compiled here: train() itself is run and watched, at least until it has begun to learn.
"""

import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from serve import BATCH, FILLED, UPDATES, channel, serve, setting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import mbpo_ftfl as script

FUNCTIONS = {"sac_update", "model_update", "model_step"}  # those that train() compiles
FIT_EVERY, FIT_UPDATES = 25, 50  # of whole runs: two updates of the ensemble per step


class Ready(Exception):
    """Ends a run that has shown what was looked for."""


class Run:
    """A script's own train(), with its functions in view.

    `first` holds, by name, each function, the arguments of its first call and the seconds of that,
    most of them compilation; `spans` the stamps before and after each call.
    """

    def __init__(self, name: str, device: str):
        self.own, self.device, self.compile = import_module(name), device, torch.compile
        self.first, self.spans = {}, defaultdict(list)

    def train(self, on_step, **settings) -> None:
        """Trains, with `on_step(n)` before the n-th step; no evaluations, no checkpoints."""
        known = {field.name for field in fields(self.own.Args)}
        settings |= {"device": self.device, "eval_frequency": 0, "checkpoint_frequency": 0}
        settings = {key: value for key, value in settings.items() if key in known}
        make_env, count = self.own.make_env, 0
        rollout, fit = (getattr(self.own, name, None) for name in ("rollout", "fit_ensemble"))

        def watched_env(*args):
            env = make_env(*args)
            env_step = env.step

            def step(action):
                nonlocal count
                count += 1
                on_step(count)
                return env_step(action)

            env.step = step
            return env

        def watched_rollout(*args):
            self.first.setdefault("rollout", (rollout, args, 0.0))
            return rollout(*args)

        def watched_fit(*args):
            before = self.stamp()
            result = fit(*args)
            self.spans["fit"].append((before, self.stamp()))
            return result

        watched = {"make_env": watched_env}
        if rollout:
            watched |= {"rollout": watched_rollout, "fit_ensemble": watched_fit}
        with mock.patch.multiple(self.own, **watched), mock.patch("torch.compile", self.watch):
            with tempfile.TemporaryDirectory() as folder:
                self.own.train(self.own.Args(**settings, run_root=folder))

    def watch(self, function, **options):
        """torch.compile, that puts the calls of an update function down."""
        compiled = self.compile(function, **options)
        parts = getattr(function, "func", function), *getattr(function, "args", ())
        if not (names := FUNCTIONS & {getattr(part, "__name__", "") for part in parts}):
            return compiled
        name = names.pop()

        def call(*args):
            before = self.stamp()
            result = compiled(*args)
            self.spans[name].append((before, self.stamp()))
            if name not in self.first:
                wait(self.device)
                self.first[name] = compiled, args, self.seconds(name)
            return result

        return call

    def stamp(self):
        """The time on the device, without waiting for it."""
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, name: str) -> float:
        """Seconds that the device has spent in a function."""
        if self.device == "cuda":
            return sum(before.elapsed_time(after) for before, after in self.spans[name]) / 1000
        return sum(after - before for before, after in self.spans[name])


def wait(device: str) -> None:
    """Returns once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def random_buffer(obs_dim: int, action_dim: int, device: str):
    """A buffer full of random transitions that go on."""
    rows = torch.randn(FILLED, 2 * obs_dim + action_dim + 2).clamp(-1, 1)
    rows[:, -1] = 0
    buffer = script.ReplayBuffer(FILLED, obs_dim, action_dim, torch.device(device))
    buffer.add(rows.to(device))
    return buffer


def update_setups(task: dict, run: Run) -> dict:
    """How SAC updates, model updates and rollouts are done with the functions of a run."""
    sizes, device = (task["obs"], task["action"]), task["device"]
    buffer, draw = random_buffer(*sizes, device), {"device": device}

    def sac():
        """20 updates, as in an environment step."""
        update, (agent, *_), _ = run.first["sac_update"]

        def once() -> int:
            rows = buffer.sample(UPDATES, BATCH, draw=draw)
            noise = torch.randn(UPDATES, 2, BATCH, sizes[1], **draw)
            for i in range(UPDATES):
                update(agent, buffer.unpack(rows[i]), noise[i])
            return UPDATES

        return once

    def model():
        """32 updates of the ensemble, as in a fit, on the last 8,192 transitions."""
        update, (learner, *_), _ = run.first["model_update"]
        data, members = buffer.unpack(buffer.rows[: 32 * BATCH]), script.Args.ensemble_size
        x, y = torch.cat([data.obs, data.action], -1), script.model_targets(data)
        bootstrap = torch.randint(len(x), (members, len(x)), **draw)

        def once() -> int:
            for _ in range(32):
                rows = bootstrap.gather(1, torch.randint(len(x), (members, BATCH), **draw))
                update(learner, F.embedding(rows, x), F.embedding(rows, y))
            return 32

        return once

    def rollout():
        """400 branches of one step, from the real buffer to the synthetic one."""
        function, (model, actor, _, *fixed), _ = run.first["rollout"]
        synthetic = script.ReplayBuffer(400_000, *sizes, torch.device(device))

        def once() -> int:
            starts = buffer.unpack(buffer.sample(script.Args.rollouts_per_step, draw=draw))
            synthetic.add(function(model, actor, starts, *fixed))
            return len(starts.obs)

        return once

    return {"sac": sac, "model": model, "rollout": rollout}


class Products(TorchDispatchMode):
    """Takes down the shapes of the matrix products made meanwhile."""

    def __init__(self):
        super().__init__()
        self.shapes = []  # of both factors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if first is not None:
            self.shapes.append(tuple(tuple(x.shape) for x in args[first : first + 2]))
        return func(*args, **kwargs or {})


def products(kind: str, obs_dim: int, action_dim: int) -> tuple[list, int]:
    """Shapes of the products in one uncompiled update, and its floating-point operations."""
    args, cpu, dims = script.Args(), torch.device("cpu"), (obs_dim, action_dim)
    if kind == "sac":
        nets = {"actor": script.mlp(obs_dim, 2 * action_dim), "critic": script.Critic(*dims)}
        buffer = random_buffer(*dims, "cpu")
        batch, noise = buffer.unpack(buffer.rows[:BATCH]), torch.randn(2, BATCH, action_dim)
        agent = script.sac_init(nets, args.alpha, cpu)
        update = partial(script.sac_update, agent, batch, noise, nets, args)
    else:
        members, sizes = args.ensemble_size, (sum(dims), obs_dim + 1)
        net = script.Ensemble(members, *sizes, args.model_hidden)
        data = (torch.randn(members, BATCH, size) for size in sizes)
        update = partial(script.model_update, script.adam_init(net, cpu), *data, net, args)
    with FlopCounterMode(display=False) as counter, Products() as seen:
        update()
    flop = sum(2 * prod(one) * other[-1] for one, other in seen.shapes)
    if flop != counter.get_total_flops():
        raise NotImplementedError("the update has products that the ceiling does not know")
    return seen.shapes, flop


def ceiling(shapes: list, device: str):
    """The products of an update alone, from memory at hand, each in the fastest of three ways."""
    fastest = []
    for one, other in shapes:
        x, y = torch.randn(one, device=device), torch.randn(other, device=device)
        turned, multiply = y.mT.contiguous(), torch.bmm if x.ndim == 3 else torch.mm
        ways = [partial(multiply, x, z, out=x @ y) for z in (y, turned.mT)]
        if device == "cpu" and torch.backends.mkldnn.is_available():  # oneDNN, as in compiled code
            linear = partial(torch.ops.mkldnn._linear_pointwise, B=None, attr="none")
            linear = partial(linear, scalars=[], algorithm="")
            pairs = [*zip(x, turned, strict=True)] if x.ndim == 3 else [(x, turned)]
            ways.append(lambda f=linear, pairs=pairs: [f(a, b) for a, b in pairs])
        threads = {"num_threads": torch.get_num_threads()}
        times = [Timer("f()", globals={"f": way}, **threads).timeit(20).median for way in ways]
        fastest.append(ways[times.index(min(times))])

    def once() -> int:
        for way in fastest:
            way()
        return 1

    if device != "cuda":
        return once
    once()
    graph = torch.cuda.CUDAGraph()  # without the time to launch them
    with torch.cuda.graph(graph):
        once()
    return lambda: graph.replay() or 1


def environment(env_id: str):
    """Steps of the environment alone, with random actions."""
    env = script.make_env(env_id)
    env.reset(seed=0)

    def once() -> int:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        return 1

    return once


def serve_steps(task: dict) -> None:
    """Serves environment steps of a whole run, which is held before a step in between.

    Settings are the defaults, but for fits, which are ten times as frequent and as short. Answers
    tell the numbers of updates, too, and the seconds spent in them.
    """
    run, (requests, answer), start = Run(task["script"], task["device"]), channel(), 0
    request, began = next(requests), time.perf_counter()
    period = FIT_EVERY if hasattr(run.own.Args, "model_updates") else 1
    settings = {"model_train_frequency": FIT_EVERY, "env_id": task["env_id"]}
    settings |= {"model_first_updates": FIT_UPDATES, "model_updates": FIT_UPDATES}

    def on_step(step: int) -> None:
        nonlocal request, start, began
        learnt = step - run.own.Args.learning_starts - 1  # steps since the first fit
        if learnt < 0 or learnt % period:
            return
        if start and time.perf_counter() - began < request["seconds"]:
            return
        wait(run.device)
        facts = {"count": step - start if start else 0, "seconds": time.perf_counter() - began}
        for kind in ("sac", "model"):
            name = f"{kind}_update"
            facts |= {f"{name}s": len(run.spans[name]), f"{kind}_seconds": run.seconds(name)}
        facts["fit_seconds"] = run.seconds("fit")
        answer(version=torch.__version__, **facts)
        request = next(requests, None) or sys.exit()
        run.spans.clear()
        start, began = step, time.perf_counter()

    run.train(on_step, **settings)


def main() -> None:
    """Serves what the command line asks for."""
    task = setting()
    if "script" in task:
        return serve_steps(task)
    run = Run("mbpo_ftfl", task["device"])

    def on_step(step: int) -> None:
        if step > 1000:
            raise Ready

    with suppress(Ready):  # after a fit, a rollout and the updates of a step
        run.train(on_step, env_id=task["env_id"], learning_starts=1000, model_first_updates=20)
    setups = update_setups(task, run) | {"env": partial(environment, task["env_id"])}
    for kind in ("sac", "model"):
        shapes = products(kind, task["obs"], task["action"])[0]
        setups[f"{kind} products"] = partial(ceiling, shapes, run.device)
    names = {"sac": "sac_update", "model": "model_update", "rollout": "model_step"}
    compiled = {kind: run.first[name][2] for kind, name in names.items()}
    serve(setups, "torch", partial(wait, run.device), compiled)


if __name__ == "__main__":
    main()
