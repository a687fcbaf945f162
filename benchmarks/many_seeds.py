"""Trains one of the four scripts, unchanged, with many seeds at once: N runs, one call per update.

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

import argparse
import math
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.benchmark import Timer
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results" / "throughput"
# Fits go first: a run whose fit ends early waits for the others, and all stay in step.
ORDER = ["model_update", "model_step", "sac_update"]
EXAMPLES = """examples:
  python benchmarks/many_seeds.py sac.py --env-id dmc/walker-run --seeds 1 2 3 4
  python benchmarks/many_seeds.py mbpo_ftfl.py --env-id dmc/walker-run --seeds 1 2 3 4 --resume
  python benchmarks/many_seeds.py mbpo_ftfl.py --env-id dmc/humanoid-walk --measure 1 8 32
All flags of the script may follow but --seed and --track; `python SCRIPT --help` explains them."""


class Stopped(Exception):
    """Ends a run that something else has stopped."""


class Call:
    """A run's call of an update function, to be made together with those of the others."""

    def __init__(self, slot: int, function: Callable, args: tuple):
        self.slot, self.function, self.args = slot, function, args
        self.name = function.func.__name__
        self.result = None  # of all N runs, in tensors [N, ...], once it is made


class ManySeeds:
    """Runs of a script, loaded for them alone, that differ in the seed.

    One thread runs at a time, so that random and other global state is as in a single run. Where a
    run calls an update function, the call is only taken down. Once no run can go on without a
    result, the calls of one function are made as one: the compiled torch.vmap of the script's own
    function. What it updates in place, each run's learners, are slices of stacked tensors.
    """

    def __init__(self, script, args, seeds: list[int]):
        self.script, self.args, self.slots = script, args, range(len(seeds))
        self.seeds, self.names = seeds, [f"seed {seed}" for seed in seeds]  # names of threads
        lock = threading.Lock()  # whoever holds it may run
        self.runs, self.conductor = threading.Condition(lock), threading.Condition(lock)
        self.calls = [deque() for _ in seeds]  # each run's calls, yet to be made
        self.awaited = dict.fromkeys(self.slots)  # the call that each live run waits for
        self.updates = [0] * len(seeds)  # calls of sac_update
        self.functions, self.arguments = {}, {}  # what is called by name, and was with what
        self.stacks, self.adopted, self.homes = {}, {}, {}  # see `adopt`
        self.live = cache(
            lambda on: torch.tensor([x in on for x in self.slots], device=self.device)
        )
        self.ends = deque(maxlen=201)  # times of the last SAC updates
        self.stop, self.device, self.failed = None, None, []

    def check(self) -> None:
        """Raises the script's InputError if one of the runs would; leaves the disk as it is."""
        read_run = self.script.read_run

        def note_device(args, device: torch.device) -> tuple:
            self.device = device
            return read_run(args, device)

        hooks = {"read_run": note_device, "open_run": mock.Mock(side_effect=Stopped)}
        with mock.patch.multiple(self.script, **hooks):
            for seed in self.seeds:
                with suppress(Stopped):
                    self.script.train(replace(self.args, seed=seed))

    def train(self) -> None:
        """Trains all, to the end of the last; raises what stops them all."""
        self.check()
        script, settings = self.script, {"compile": self.args.compile}  # as the run folders have it
        read_run, write_file = script.read_run, script.write_file
        script.read_run = lambda args, device: read_run(replace(args, **settings), device)
        own = partial(tree_map_only, Tensor, torch.clone)  # without others' share of the memory
        script.write_file = lambda path, content: write_file(path, own(content))
        self.jit = script.setup_torch(self.args, self.device)
        self.in_place, script.in_place = script.in_place, self.call
        script.model_step = partial(self.call, getattr(script, "model_step", None))
        script.tqdm = partial(self.progress)
        script.tqdm.write = lambda text, **to: tqdm.write(f"{self.name()}: {text}", **to)
        script.tqdm.format_interval = tqdm.format_interval
        self.line = tqdm(total=self.args.total_timesteps * len(self.seeds), disable=None)  # of all
        threads = [threading.Thread(target=self.run, name=x, daemon=True) for x in self.names]
        with self.conductor:
            try:
                for thread in threads:
                    thread.start()
                self.conduct()
            except BaseException as error:
                self.stop = self.stop or error
            self.runs.notify_all()
        for thread in threads:
            thread.join()
        self.line.close()
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
                self.script.train(replace(self.args, seed=self.seeds[slot], compile=False))
            except FloatingPointError as error:
                self.failed.append(slot)
                tqdm.write(f"error: {self.name()}: {error}", file=sys.stderr)
            except BaseException as error:
                self.stop = self.stop or error
            self.calls[slot].clear()
            del self.awaited[slot]
            self.conductor.notify()

    def progress(self, initial: int = 0, disable: bool | None = None, **_) -> SimpleNamespace:
        """Stands in for a run's own progress line: its part of the line of all."""

        def update() -> None:
            if self.stop:
                raise Stopped
            self.line.update(not disable)

        self.line.update(initial)
        return SimpleNamespace(update=update, close=lambda: None)

    def call(self, function: Callable, *args, **fixed):
        """Stands in for an update: takes the call down, and after the last of a step waits."""
        slot = self.names.index(self.name())
        self.calls[slot].append(call := Call(slot, partial(function, **fixed), args))
        if call.name == "sac_update":
            self.updates[slot] += 1
            if self.updates[slot] % self.args.updates_per_step:
                return None  # nobody looks into its metrics
        if call.result is None:
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
        if updates:
            for call in calls.values():
                self.adopt(call)
            stacked = self.stacks[first.name], self.live(tuple(calls)), *stacked
        if first.name not in self.functions:
            self.functions[first.name] = self.mapped(first.function, updates)
        self.arguments[first.name] = stacked
        result = self.functions[first.name](*stacked)
        for slot, call in calls.items():
            self.calls[slot].popleft()
            call.result, call.args = result, None
        if first.name == "sac_update":
            self.ends.append(time.perf_counter())

    def mapped(self, function: Callable, updates: bool) -> Callable:
        """The function of stacked arguments, compiled as the scripts compile that of one run."""

        def update(state: dict, live: Tensor, *inputs) -> tuple:
            new, metrics = function(state, *inputs)
            return tree_map(partial(torch.where, live), new, state), metrics

        if not updates:
            return self.jit(torch.vmap(function))
        return self.jit(partial(self.in_place, torch.vmap(update)), mode="reduce-overhead")

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


def load(path: Path):
    """A script as a module of its own, in which names can be replaced."""
    sys.path.insert(0, str(path.resolve().parent))  # where modules of tasks may lie, too
    spec = util.spec_from_file_location("script_of_many_seeds", path)
    sys.modules[spec.name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(path: Path, args, counts: list[int]) -> None:
    """Writes a table of updates and environment steps per second, each summed over N seeds.

    Steps are those of short real runs, after the first fit and without evaluations; updates are the
    calls that these runs made, repeated with the last arguments.
    """
    import pandas as pd  # here, because training does without

    steps, threads, rows = math.ceil(200 / args.updates_per_step), torch.get_num_threads(), []
    short = {"learning_starts": 300, "total_timesteps": 300 + steps, "model_first_updates": 10}
    short |= {"eval_frequency": 0, "checkpoint_frequency": 0, "buffer_size": 1000}
    short = {name: value for name, value in short.items() if hasattr(args, name)}
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            many = ManySeeds(load(path), replace(args, run_root=folder, **short), range(n))
            many.train()
        device = torch.cuda.get_device_name() if many.device.type == "cuda" else many.device.type
        row = {"device": device, "threads": threads, "script": path.name, "task": args.env_id}
        row["seeds"] = n
        for name in sorted(many.functions.keys() - {"model_step"}):
            call = {"f": many.functions[name], "x": many.arguments[name]}
            timer = Timer("f(*x)", globals=call, num_threads=threads)
            row[f"{name}s_per_s"] = n / timer.blocked_autorange(min_run_time=2).median
        updates, seconds = len(many.ends) - 1, many.ends[-1] - many.ends[0]
        rows.append(row | {"steps_per_s": n * updates / args.updates_per_step / seconds})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"many_seeds_{many.device.type}.csv"
    pd.DataFrame(rows).to_csv(file, index=False, float_format="%.4g")
    file.with_suffix(".md").write_text(pd.read_csv(file).to_markdown(index=False) + "\n")
    print(f"\n{file.with_suffix('.md').read_text()}\n{file}")


def fail(message: str, code: int = 2):
    """One line on stderr, and the end."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Trains or measures; bad input is one line on stderr and exit code 2, a seed's failure 1."""
    warnings.showwarning = lambda *_, **__: None  # libraries' words about libraries
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, **style)
    parser.error = lambda message: fail(f"{message}; --help shows examples")
    parser.add_argument("script", metavar="SCRIPT", type=Path, help="sac.py, mbpo.py, ...")
    many = {"type": int, "metavar": "N"}
    parser.add_argument("--seeds", nargs="+", help="a run for each", **many)
    what = "updates per second with N seeds, instead of training (1 2 4 8 16)"
    parser.add_argument("--measure", nargs="*", help=what, **many)
    given, words = parser.parse_known_args()
    path, seeds, counts = given.script, given.seeds or [], given.measure
    ours = path.is_file() and "def sac_update(" in path.read_text(errors="replace")
    flags = {word.split("=")[0] for word in words}
    for wrong, message in [
        (not ours, f"{path} is not the path of one of the scripts, such as mbpo_ftfl.py"),
        ("--seed" in flags, "instead of --seed give --seeds 1 2 3"),
        ("--track" in flags, "--track is for single runs: it follows one run of a process"),
        (bool(seeds) == (counts is not None), "give --seeds 1 2 3, or else --measure"),
        (len(set(seeds)) < len(seeds), "--seeds must name each seed once"),
        (min(counts or [1]) < 1, "--measure wants numbers of seeds, at least 1"),
    ]:
        if wrong:
            fail(message)
    script = load(path)
    args = tyro.cli(script.Args, args=words, prog=f"many_seeds.py {path}")
    runs = ManySeeds(script, args, seeds)

    def interrupt(*_) -> None:  # a second Ctrl-C kills; --resume goes on in either case
        runs.stop = KeyboardInterrupt("interrupted")
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    try:
        if counts is not None:
            return measure(path, args, counts or [1, 2, 4, 8, 16])
        signal.signal(signal.SIGINT, interrupt)
        runs.train()
    except KeyboardInterrupt as error:
        fail(str(error) or "interrupted", 1)
    except ValueError as error:
        if type(error).__name__ != "InputError":  # of the script, or of its copy
            raise
        fail(str(error))
    if runs.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
