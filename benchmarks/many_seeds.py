"""Trains one of the four scripts, unchanged, with many seeds at once: N runs, one call per update.

    python benchmarks/many_seeds.py sac.py --seeds 1 2 3 4 --env-id dmc/walker-run
    python benchmarks/many_seeds.py mbpo_ftfl.py --seeds 1 2 3 4 --resume
    python benchmarks/many_seeds.py mbpo_ftfl.py --measure 1 8 32 --env-id dmc/humanoid-walk

After --seeds or --measure all flags of the script may follow but --seed and --track.

Each run is the script's own train() in a thread of its own, and writes the run folder that a single
run of its seed writes, up to rounding: products of stacked matrices are summed in another order.
Single runs can be taken up here with --resume, and the other way round. The column of seconds in
eval.csv is the time of all.

On a CPU there is nothing to win: an update keeps it busy with one seed already, and what updates
of many seeds gain, taking turns costs; start single runs side by side. On a GPU one run is expected
to leave most of it idle; --measure tells how much. Environments are stepped one after the other, in
this process: beside the 20 updates of the scripts with a model a step takes little time, so worker
processes, which must be sent to and waited for, would not pay.
"""

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
import tyro
from common import RESULTS as ALL_RESULTS
from common import InputError, load_script, load_task, markdown, parse, run_tool
from peers.serve import timed
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from updates import FIT_EVERY, Updates, short_run, watched_steps

RESULTS = ALL_RESULTS / "throughput"
# Fits go first: a run whose fit ends early waits for the others, and all stay in step.
ORDER = ["model_update", "model_step", "sac_update"]


class Stopped(Exception):
    """Ends a run that something else has stopped."""


class Call:
    """A run's call of an update function, to be made together with those of the others."""

    def __init__(self, slot: int, function: Callable, args: tuple):
        self.slot, self.function, self.args = slot, function, args
        self.name = function.func.__name__
        self.result = None  # of all N runs, in tensors [N, ...], once it is made


def of_many(function: Callable) -> Callable:
    """An update of stacked states and inputs, which leaves states as they are that don't live."""

    def update(state: dict, live: Tensor, *inputs) -> tuple:
        new, metrics = function(state, *inputs)
        return tree_map(partial(torch.where, live), new, state), metrics

    return torch.vmap(update)


class ManySeeds:
    """Runs of a script that differ in the seed.

    One thread runs at a time, so that random and other global state is as in a single run. Where a
    run calls an update function, the call is only taken down. Once no run can go on without a
    result, the calls of one function are made as one: the compiled torch.vmap of the script's own
    function. What it updates in place, each run's learners, are slices of stacked tensors.
    """

    def __init__(self, script, args, seeds: list[int]):
        self.script, self.args, self.seeds = script, args, seeds
        self.slots, self.names = range(len(seeds)), [f"seed {seed}" for seed in seeds]  # of threads
        lock = threading.Lock()  # whoever holds it may run
        self.runs, self.conductor = threading.Condition(lock), threading.Condition(lock)
        self.calls = [deque() for _ in seeds]  # each run's calls, yet to be made
        self.awaited = dict.fromkeys(self.slots)  # the call that each live run waits for
        self.updates = [0] * len(seeds)  # calls of sac_update
        self.functions, self.stacks, self.adopted, self.homes = {}, {}, {}, {}  # see `adopt`
        self.jit, self.device, self.stop, self.failed = None, None, None, []
        self.live = cache(
            lambda of: torch.tensor([slot in of for slot in self.slots], device=self.device)
        )

    def check(self) -> None:
        """Raises InputError, with nothing written, if the settings or a run folder are refused."""
        for seed in self.seeds:
            args = replace(self.args, seed=seed)
            self.script.check_args(args)
            folder = self.script.run_folder(args)
            if folder.is_dir() and any(folder.iterdir()) and not args.resume:
                raise InputError(f"{folder} holds a run: --resume goes on, or remove it")

    def train(self) -> None:
        """Trains all, to the end of the last; raises what stops them all."""
        self.check()
        script, self.in_place = self.script, self.script.in_place
        setup_torch, write = script.setup_torch, script.write_checkpoint
        own = partial(tree_map_only, Tensor, torch.clone)  # without others' share of the memory

        def setup_once(args, device: torch.device) -> Callable:
            if self.jit is None:
                self.jit, self.device = setup_torch(args, device), device
            return lambda function, **_: function

        hooks = {
            "setup_torch": setup_once,
            "write_checkpoint": lambda file, state: write(file, own(state)),
            "in_place": self.call,
            "model_step": partial(self.call, getattr(script, "model_step", None)),
            "print": lambda *said, **to: print(f"{self.name()}:", *said, **to),
        }
        threads = [threading.Thread(target=self.run, name=x, daemon=True) for x in self.names]
        with mock.patch.multiple(script, create=True, **hooks), self.conductor:
            for thread in threads:
                thread.start()
            try:
                self.conduct()
            except Exception as error:
                self.stop = self.stop or error
            while self.awaited:  # all end at once if something has stopped them
                self.runs.notify_all()
                self.conductor.wait()
        if self.stop:
            raise self.stop

    def name(self) -> str:
        """The name of the run whose thread this is."""
        return threading.current_thread().name

    def run(self) -> None:
        """The thread of one run: one that diverges ends alone, any other error ends all."""
        slot = self.names.index(self.name())
        with self.runs:
            try:
                self.script.train(replace(self.args, seed=self.seeds[slot]))
            except FloatingPointError as error:
                self.failed.append(slot)
                print(f"error: {self.name()}: {error}", file=sys.stderr)
            except Exception as error:
                self.stop = self.stop or error
            self.calls[slot].clear()
            del self.awaited[slot]
            self.conductor.notify()

    def call(self, function: Callable, *args, **fixed):
        """Stands in for an update: takes the call down, and after the last of a step waits."""
        slot = self.names.index(self.name())
        self.calls[slot].append(call := Call(slot, partial(function, **fixed), args))
        if call.name == "sac_update":
            self.updates[slot] += 1
            if self.updates[slot] % self.args.updates_per_step:
                return None  # nobody looks into its metrics
        self.awaited[slot] = call
        self.conductor.notify()
        self.runs.wait_for(lambda: self.stop or call.result is not None)
        if self.stop:
            raise Stopped
        return tree_map(lambda x: x[slot], call.result)

    def blocked(self) -> bool:
        """Whether each live run waits for a call that is yet to be made."""
        return all(x is not None and x.result is None for x in self.awaited.values())

    def conduct(self) -> None:
        """Makes calls whenever no run can go on, until there is no live run."""
        while self.awaited and not self.stop:
            if self.blocked():
                self.make_calls()
            else:
                self.runs.notify_all()
                self.conductor.wait_for(lambda: self.stop or self.blocked())

    def make_calls(self) -> None:
        """Makes the next call of every run at once, as far as these are of one function."""
        heads = [calls[0] for calls in self.calls if calls]
        first = min(heads, key=lambda call: ORDER.index(call.name))
        calls = {call.slot: call for call in heads if call.name == first.name}
        updates = first.name != "model_step"  # its first argument, a state, in place
        given = [calls.get(slot, first).args[updates:] for slot in self.slots]  # idle: as first
        stacked = tree_map(self.stack, *given)
        if first.name not in self.functions:
            self.functions[first.name] = self.compiled(first.function, updates)
        if updates:
            for call in calls.values():
                self.adopt(call)
            stacked = self.stacks[first.name], self.live(tuple(calls)), *stacked
        result = self.functions[first.name](*stacked)
        for slot, call in calls.items():
            self.calls[slot].popleft()
            call.result, call.args = result, None

    def compiled(self, function: Callable, updates: bool) -> Callable:
        """The function of stacked arguments, compiled as the scripts compile that of one run."""
        if updates:
            function = partial(self.in_place, of_many(function))
            return self.jit(function, mode="reduce-overhead")
        return self.jit(torch.vmap(function))

    def adopt(self, call: Call) -> None:
        """Moves a run's state into the stack of all runs' states, where it is not there yet."""
        name, slot, state = call.name, call.slot, call.args[0]
        if self.adopted.get((name, slot)) is state:
            return
        if name not in self.stacks:
            self.stacks[name] = tree_map(lambda x: torch.stack([x] * len(self.slots)), state)
            tree_map(torch._dynamo.mark_static_address, self.stacks[name])

        def move(own: Tensor, stack: Tensor) -> None:
            stack[slot].copy_(own)
            self.homes[own.set_(stack[slot])] = stack

        tree_map(move, state, self.stacks[name])
        self.adopted[name, slot] = state

    def stack(self, *tensors: Tensor) -> Tensor:
        """The tensors of N runs as one [N, ...]: the stack that they are slices of, or a new."""
        homes = [self.homes.get(x) for x in tensors]
        found = homes[0] is not None and all(home is homes[0] for home in homes)
        return homes[0] if found else torch.stack(tensors)


def measure(script, args, counts: tuple[int, ...]) -> None:
    """Writes a table of updates and environment steps per second, each summed over N seeds.

    Updates are those of throughput.py, and steps, after the first fit, those of its runs.
    """
    import pandas as pd  # here, because training does without

    script.check_args(args)
    env = script.make_env(args.env_id)
    sizes, rows = (env.observation_space.shape[0], env.action_space.shape[0]), []
    steps = FIT_EVERY * math.ceil(200 / (FIT_EVERY * args.updates_per_step))
    short = {"learning_starts": 300, "total_timesteps": 301 + steps, "buffer_size": 1000}
    for n in counts:
        times = []
        with tempfile.TemporaryDirectory() as folder:
            many = ManySeeds(script, short_run(args, run_root=folder, **short), range(n))
            with watched_steps(script, lambda times=times: times.append(time.perf_counter())):
                many.train()
        device, live = many.device.type, torch.ones(n, device=many.device) > 0
        row = {"device": torch.cuda.get_device_name() if device == "cuda" else device}
        row |= {"threads": torch.get_num_threads(), "script": Path(script.__file__).name}
        row |= {"task": args.env_id, "seeds": n}

        def build(function: Callable, many=many, live=live) -> Callable:
            update = many.compiled(function, updates=True)
            return lambda state, *inputs: update(state, live, *inputs)

        work = Updates(script, args, sizes, device, build, seeds=(n,))
        for kind in ("sac", "model")[: 1 + hasattr(script, "model_update")]:
            once = getattr(work, kind)()
            once(), once()  # compiles it
            count, seconds = timed(once, 2)
            row[f"{kind}_updates_per_s"] = n * count / seconds
        row["steps_per_s"] = n * steps / (times[-n] - times[300 * n])
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file, table = RESULTS / f"many_seeds_{device}.csv", pd.DataFrame(rows)
    table.to_csv(file, index=False, float_format="%.4g")
    file.with_suffix(".md").write_text(markdown(table) + "\n")
    print(f"\n{markdown(table)}\n\n{file}")


@dataclass
class Options:
    script: tyro.conf.Positional[Path]  # sac.py, mbpo.py, ...
    seeds: tuple[int, ...] = ()  # a run for each
    measure: tuple[int, ...] | None = None
    """updates per second with so many seeds, instead of training; alone: 1 2 4 8 16"""


def run(given: tuple[Options, list[str]]) -> None:
    """Trains or measures, with what the command line has besides the options as the script's."""
    (options, words), path = given, given[0].script.resolve()
    flags = {word.split("=")[0] for word in words}
    ours = path.is_file() and "def sac_update(" in path.read_text(errors="replace")
    for wrong, message in [
        (not ours, f"{path} is not the path of one of the scripts, such as mbpo_ftfl.py"),
        (flags & {"--seed", "--track"}, "--seed and --track are for single runs: give --seeds"),
        (bool(options.seeds) == (options.measure is not None), "give --seeds 1 2 3, or --measure"),
        (len({*options.seeds}) < len(options.seeds), "--seeds must name each seed once"),
    ]:
        if wrong:
            raise InputError(message)
    script = load_script(path)
    args = parse(script.Args, script.__doc__, words, prog=f"many_seeds.py {path.name}")
    load_task(args.env_id, path.parent)
    if options.measure is not None:
        return measure(script, args, options.measure or (1, 2, 4, 8, 16))
    runs = ManySeeds(script, args, list(options.seeds))
    runs.train()
    if runs.failed:
        sys.exit(1)


def interrupt(*_) -> None:
    """Ends the process at once: what the runs have saved is whole, and --resume goes on there."""
    os.write(2, b"error: interrupted\n")
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    try:
        run_tool(run, Options, __doc__, return_unknown_args=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is saved
