"""Trains one of the four scripts, unchanged, with many seeds at once: N runs, one call per update.

    python benchmarks/many_seeds.py sac.py --seeds 1 2 3 4 --env-id dmc/walker-run
    python benchmarks/many_seeds.py mbpo_ftfl.py --seeds 1 2 3 4 --resume

After --seeds all flags of the script may follow but --seed and --track. Each run is the script's
own train() in a thread, and writes the folder that a single run of its seed writes, up to rounding:
stacked products are summed in another order. With --resume it takes up single runs, and they its
runs; seconds in eval.csv are those of all. It is for GPUs: on a CPU start runs side by side.
"""

import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import tyro
from common import InputError, load_script, load_task, parse, run_tool
from held import Held
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

# Fits go first: a run whose fit ends early waits for the others, and all stay in step.
ORDER = ["model_update", "model_step", "sac_update"]


class ManySeeds:
    """Runs of a script that differ in the seed; InputError, and nothing written, if one is refused.

    Where a run calls an update function, it is held. Once all are, the calls of one function are
    made as one: the compiled torch.vmap of that. What it updates, each run's learners, are slices
    of stacked tensors. As one thread goes on at a time, global state is as in a single run.
    """

    def __init__(self, script, args, seeds: tuple[int, ...]):
        self.script, self.args, self.device = script, args, torch.device(args.device)
        settings = [replace(args, seed=seed) for seed in seeds]
        for one in settings:
            script.check_args(one)
            script.read_run(one, self.device)
        self.runs = [Held(partial(script.train, one), f"seed {one.seed}") for one in settings]
        self.calls = defaultdict(list)  # inputs of each run's calls that are yet to be made
        self.functions, self.stacks = {}, {}  # by name: the joint function, the state of all runs
        self.states, self.homes = {}, {}  # a run's state in a stack; a tensor's stack

    def train(self) -> bool:
        """Trains all, to the end of the last; tells whether all got there."""
        script, self.in_place = self.script, self.script.in_place
        self.jit = script.setup_torch(self.args, self.device)
        write, own = script.write_checkpoint, partial(tree_map_only, Tensor, torch.clone)
        hooks = {
            "setup_torch": lambda *_: lambda function, **_: function,
            "write_checkpoint": lambda file, state: write(file, own(state)),  # not all of a stack
            "in_place": self.call,
            "model_step": partial(self.call, getattr(script, "model_step", None), {}),
            "print": lambda *said, **to: print(f"{threading.current_thread().name}:", *said, **to),
        }
        waiting, failed = {}, False  # the function that each run has called
        results = dict.fromkeys(range(len(self.runs)))  # what the last call of each returns
        with mock.patch.multiple(script, create=True, **hooks):
            while results:
                for i, result in results.items():
                    try:
                        waiting[i] = self.runs[i].resume(result)
                    except FloatingPointError as error:  # this one ends alone
                        print(f"error: {self.runs[i].name}: {error}", file=sys.stderr)
                        waiting[i], failed = None, True
                waiting = {i: function for i, function in waiting.items() if function}
                results = self.make_calls(waiting) if waiting else {}
        return not failed

    def call(self, function: Callable, state: dict, *inputs, **settings):
        """Stands in for an update: takes the call down, and after the last of a step is held."""
        run, name = threading.current_thread(), function.__name__
        i = self.runs.index(run)
        if self.states.get((name, i)) is not state:
            self.adopt(name, i, state)
        self.calls[i].append(inputs)
        if name == "sac_update" and len(self.calls[i]) < self.args.updates_per_step:
            return None  # nobody looks into its metrics
        return run.hold(partial(function, **settings))

    def adopt(self, name: str, i: int, state: dict) -> None:
        """Moves a run's state into the stack of all runs' states."""
        if name not in self.stacks:
            self.stacks[name] = tree_map(lambda x: torch.stack([x] * len(self.runs)), state)
            tree_map(torch._dynamo.mark_static_address, self.stacks[name])

        def move(own: Tensor, stack: Tensor) -> None:
            stack[i].copy_(own)
            self.homes[own.set_(stack[i])] = stack

        tree_map(move, state, self.stacks[name])
        self.states[name, i] = state

    def make_calls(self, waiting: dict[int, Callable]) -> dict:
        """Makes the calls of one function; returns the last result for each run that made them."""
        function = min(waiting.values(), key=lambda f: ORDER.index(f.func.__name__))
        name, everyone = function.func.__name__, range(len(self.runs))
        callers = [i for i in waiting if waiting[i].func is function.func]
        live = torch.tensor([i in callers for i in everyone], device=self.device)
        if name not in self.functions:
            self.functions[name] = self.compiled(function)
        for inputs in zip(*(self.calls.pop(i) for i in callers), strict=True):
            given = dict.fromkeys(everyone, inputs[0])  # idle runs have anybody's
            given |= zip(callers, inputs, strict=True)
            stacked = tree_map(self.stack, *given.values())
            result = self.functions[name](self.stacks[name], live, *stacked)
        return {i: tree_map(lambda x, i=i: x[i], result) for i in callers}

    def compiled(self, function: Callable) -> Callable:
        """The function of all runs, compiled as the scripts compile that of one; idle ones rest."""
        if function.func.__name__ == "model_step":
            return self.jit(torch.vmap(lambda state, live, *inputs: function(*inputs)))

        def update(state: dict, live: Tensor, *inputs) -> tuple:
            new, metrics = function(state, *inputs)
            return tree_map(partial(torch.where, live), new, state), metrics

        return self.jit(partial(self.in_place, torch.vmap(update)), mode="reduce-overhead")

    def stack(self, *tensors: Tensor) -> Tensor:
        """The tensors of N runs as one [N, ...]: the stack that they are slices of, or a new."""
        homes = [self.homes.get(x) for x in tensors]
        found = homes[0] is not None and all(home is homes[0] for home in homes)
        return homes[0] if found else torch.stack(tensors)


@dataclass
class Options:
    script: tyro.conf.Positional[Path]  # sac.py, mbpo.py, ...
    seeds: tuple[int, ...]  # a run for each


def run(given: tuple[Options, list[str]]) -> None:
    """Trains, with what the command line has besides the options as the script's."""
    (options, words), path = given, given[0].script.resolve()
    flags = {word.split("=")[0] for word in words}
    ours = path.is_file() and "def sac_update(" in path.read_text(errors="replace")
    if not ours:
        raise InputError(f"{path} is not the path of one of the scripts, such as mbpo_ftfl.py")
    if flags & {"--seed", "--track"}:
        raise InputError("--seed and --track are for single runs: give --seeds")
    if len({*options.seeds}) < len(options.seeds):
        raise InputError("--seeds must name each seed once")
    script = load_script(path)
    args = parse(script.Args, script.__doc__, words, prog=f"many_seeds.py {path.name}")
    load_task(args.env_id, path.parent)
    if not ManySeeds(script, args, options.seeds).train():
        sys.exit(1)


def interrupt(*_) -> None:
    """Ends the process at once: what the runs have saved is whole, and --resume goes on there."""
    os.write(2, b"error: interrupted\n")
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    run_tool(run, Options, __doc__, return_unknown_args=True)
