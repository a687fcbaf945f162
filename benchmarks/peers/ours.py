"""Our updates, rollouts and steps as a script's train() makes them, or with one thing changed."""

import sys
import tempfile
from dataclasses import replace
from functools import partial

import torch
from common import load_script
from held import FIT_EVERY, FIT_UPDATES, Held
from peers.serve import serve, start

DEFAULT, UNMARKED = "products by torch's default", "addresses not marked as fixed"
BESIDE, UNCOMPILED = "new state beside the old", "uncompiled"
VARIANTS = ["as shipped", DEFAULT, UNMARKED, BESIDE, UNCOMPILED]
FITS = {"updates_per_step": 1, "model_train_frequency": 1, "model_updates": 200}
RUNS = {  # by kind: script, settings, steps that are measured together, what is done in them
    "sac": ("sac.py", {"updates_per_step": 100}, 1, 100),
    "model": ("mbpo_ftfl.py", FITS | {"learning_starts": 2000}, 1, 200),
    "rollout": ("mbpo_ftfl.py", {}, 1, 400),
}


def compile_alone(jit, function: partial, **how):
    """Compiles what in_place calls without in_place, which copies afterwards."""
    if not how:  # it is not an update
        return jit(function)
    return partial(function.func, jit(partial(*function.args, **function.keywords)))


def change(script, variant: str) -> None:
    """Changes the one thing in the script, or in torch, that a variant differs in."""
    if variant == DEFAULT:
        torch.set_float32_matmul_precision = lambda precision: None
    if variant == UNMARKED:
        torch._dynamo.mark_static_address = lambda tensor: None
    if variant == BESIDE:
        setup_torch = script.setup_torch
        script.setup_torch = lambda *given: partial(compile_alone, setup_torch(*given))


def run(task) -> None:
    """Does what start() tells; the main thread trains, as CUDA graphs want it, another serves."""
    name, settings, steps, amount = RUNS.get(task.kind, (task.task, {}, FIT_EVERY, FIT_EVERY))
    script = load_script(name)
    change(script, task.who)
    args = script.Args(env_id=task.env_id, device=task.device, compile=task.who != UNCOMPILED)
    server = Held(lambda: sys.exit(serve("torch", amount, lambda: server.hold("go on"))))
    check_finite, rollout = script.check_finite, getattr(script, "rollout", None)

    def check(step: int, **quantities) -> None:
        """check_finite, which train() calls with every action; holds the run between turns."""
        check_finite(step, **quantities)
        learnt = step - args.learning_starts - 1  # steps since the first updates
        if "action" in quantities and learnt >= 0 and learnt % steps == 0:
            server.resume()

    def rollouts(*given) -> None:
        """The run's first rollout, over and over."""
        buffer = script.ReplayBuffer(400_000, task.obs, task.action, torch.device(args.device))
        while True:
            server.resume()
            buffer.add(rollout(*given))

    script.check_finite = check
    if task.kind == "rollout":
        script.rollout = rollouts
    short = {"eval_frequency": 0, "checkpoint_frequency": 0, "model_train_frequency": FIT_EVERY}
    short |= {"model_first_updates": FIT_UPDATES, "model_updates": FIT_UPDATES} | settings
    known = {name: value for name, value in short.items() if name in vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        script.train(replace(args, run_root=folder, **known))


if __name__ == "__main__":
    run(start())
