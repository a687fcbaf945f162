"""Our updates and rollouts as train() compiles them, whole runs of train(), the products alone."""

import sys
import tempfile
import time
from functools import partial

import torch
from common import load_script
from peers.serve import channel, serve, setting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from updates import FIT_EVERY, FIT_UPDATES, Updates, as_shipped, short_run, watched_steps


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
    """Shapes of the products in one update, and its floating-point operations."""
    script, sizes = load_script("mbpo_ftfl.py"), (obs_dim, action_dim)
    build = partial(partial, script.in_place)
    work = Updates(script, script.Args(), sizes, "cpu", build, count=1)
    once = getattr(work, kind)()
    with FlopCounterMode(display=False) as counter, Products() as seen:
        once()
    return seen.shapes, counter.get_total_flops()


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
    env = load_script("mbpo_ftfl.py").make_env(env_id)
    env.reset(seed=0)

    def once() -> int:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
        return 1

    return once


def serve_steps(name: str, env_id: str, device: str) -> None:
    """Serves environment steps of a whole run, which is held before a step in between.

    A turn has whole periods of fits; the first, without a count, ends with the first fit.
    """
    script, step, start = load_script(f"{name}.py"), 0, 0
    requests, answer = channel()
    request, began = next(requests), time.perf_counter()

    def on_step() -> None:
        nonlocal request, step, start, began
        step += 1
        learnt = step - args.learning_starts - 1  # steps since the first fit
        if learnt < 0 or learnt % FIT_EVERY:
            return
        if start and time.perf_counter() - began < request["seconds"]:
            return
        count, updates = step - start if start else 0, FIT_UPDATES // FIT_EVERY
        facts = {"count": count, "sac_updates": count * args.updates_per_step}
        facts["model_updates"] = count * updates if hasattr(script, "model_update") else 0
        answer(seconds=time.perf_counter() - began, version=torch.__version__, **facts)
        request = next(requests, None) or sys.exit()
        start, began = step, time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, watched_steps(script, on_step):
        args = short_run(script.Args(env_id=env_id, device=device, run_root=folder))
        script.train(args)


def main() -> None:
    """Serves what the command line asks for."""
    task = setting()
    env_id, device, sizes = task["env_id"], task["device"], (task["obs"], task["action"])
    if "script" in task:
        return serve_steps(task["script"], env_id, device)
    script = load_script("mbpo_ftfl.py")
    jit = script.setup_torch(script.Args(), torch.device(device))
    work = Updates(script, script.Args(), sizes, device, as_shipped(script, jit))
    setups = {"sac": work.sac, "model": work.model, "rollout": partial(work.rollout, jit)}
    setups["env"] = partial(environment, env_id)
    for kind in ("sac", "model"):
        setups[f"{kind} products"] = lambda kind=kind: ceiling(products(kind, *sizes)[0], device)
    serve(setups, "torch")


if __name__ == "__main__":
    main()
