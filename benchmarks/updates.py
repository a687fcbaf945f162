"""One way to drive updates and runs in order to measure them, for all the tools that do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from peers.serve import BATCH, FILLED, UPDATES
from torch.utils._pytree import tree_map

FIT_EVERY, FIT_UPDATES = 25, 50  # of runs: ten times as frequent and as short as the defaults


def as_shipped(script, jit: Callable) -> Callable:
    """How train() compiles an update function with the `jit` that its setup_torch returns."""
    return lambda function: jit(partial(script.in_place, function), mode="reduce-overhead")


class Updates:
    """A script's updates and rollouts, on a buffer of made-up transitions that go on.

    `build` makes update(state, *inputs), which works in place, of one of the script's functions;
    `seeds` (N,) puts N learners and their batches into one call; `fixed` marks their addresses, as
    CUDA graphs want it; `count` updates are made at a time, as many as in an environment step.
    """

    def __init__(
        self, script, args, sizes: tuple, device: str, build, seeds=(), fixed=True, count=UPDATES
    ):
        self.script, self.args, self.build = script, args, build
        self.sizes, self.seeds, self.fixed, self.count = sizes, seeds, fixed, count
        self.draw, self.device = {"device": device}, torch.device(device)
        rows = torch.randn(FILLED, 2 * sizes[0] + sizes[1] + 2, **self.draw).clamp(-1, 1)
        rows[:, -1] = 0
        self.buffer = script.ReplayBuffer(FILLED, *sizes, self.device)
        self.buffer.add(rows)
        data = self.buffer.unpack(rows[: 32 * BATCH])
        self.inputs = torch.cat([data.obs, data.action], -1)
        self.targets = torch.cat([data.next_obs, data.reward[:, None]], -1)
        self.nets = {"actor": script.mlp(sizes[0], 2 * sizes[1]), "critic": script.Critic(*sizes)}
        if hasattr(script, "Ensemble"):
            members, hidden = self.args.ensemble_size, self.args.model_hidden
            shape = (self.inputs.shape[1], self.targets.shape[1])
            self.nets["ensemble"] = script.Ensemble(members, *shape, hidden)

    def learners(self, state: dict) -> dict:
        """The state of one learner, or of as many as there are seeds."""
        state = tree_map(lambda x: x.expand((*self.seeds, *x.shape)).clone(), state)
        if self.fixed:
            tree_map(torch._dynamo.mark_static_address, state)
        return state

    def sac(self) -> Callable[[], int]:
        """SAC updates."""
        nets = {name: self.nets[name] for name in ("actor", "critic")}
        update = self.build(partial(self.script.sac_update, nets=nets, args=self.args))
        size = self.args.batch_size
        agent = self.learners(self.script.sac_init(nets, self.args.alpha, self.device))

        def once() -> int:
            rows = self.buffer.sample(self.count, *self.seeds, size, draw=self.draw)
            noise = torch.randn(self.count, *self.seeds, 2, size, self.sizes[1], **self.draw)
            for i in range(self.count):
                update(agent, self.buffer.unpack(rows[i]), noise[i])
            return self.count

        return once

    def model(self) -> Callable[[], int]:
        """Updates of the ensemble, on 8,192 transitions."""
        net, size = self.nets["ensemble"], len(self.inputs)
        update = self.build(partial(self.script.model_update, net=net, args=self.args))
        learner = self.learners(self.script.adam_init(net, self.device))
        members = *self.seeds, self.args.ensemble_size
        bootstrap = torch.randint(size, (*members, size), **self.draw)

        def once() -> int:
            for _ in range(self.count):
                rows = bootstrap.gather(-1, torch.randint(size, (*members, BATCH), **self.draw))
                update(learner, F.embedding(rows, self.inputs), F.embedding(rows, self.targets))
            return self.count

        return once

    def rollout(self, jit: Callable) -> Callable[[], int]:
        """400 branches of one step, from the real buffer to the synthetic one."""
        script, args, task = self.script, self.args, replace(self.args, never_terminates=True)
        data = {"inputs": self.inputs, "targets": self.targets}
        model = {"scaler": {name: script.fit_scaler(x) for name, x in data.items()}}
        model["learner"] = script.adam_init(self.nets["ensemble"], self.device)
        model["elites"] = torch.arange(args.num_elites, **self.draw)
        actor = script.adam_init(self.nets["actor"], self.device)["params"]
        step = jit(partial(script.model_step, nets=self.nets, args=args))
        synthetic = script.ReplayBuffer(400_000, *self.sizes, self.device)
        fixed = 1, step, script.termination_function(task), {"generator": None} | self.draw

        def once() -> int:
            rows = self.buffer.sample(args.rollouts_per_step, draw=self.draw)
            synthetic.add(script.rollout(model, actor, self.buffer.unpack(rows), *fixed))
            return len(rows)

        return once


def short_run(args, **changes):
    """The settings of a run to be measured: nothing is evaluated or saved, fits are short."""
    wanted = {"eval_frequency": 0, "checkpoint_frequency": 0, "model_train_frequency": FIT_EVERY}
    wanted |= {"model_first_updates": FIT_UPDATES, "model_updates": FIT_UPDATES} | changes
    known = {field.name for field in fields(args)}
    return replace(args, **{name: value for name, value in wanted.items() if name in known})


@contextmanager
def watched_steps(script, on_step: Callable[[], None]) -> Iterator[None]:
    """Has train() call on_step() before each of its environment steps."""
    make_env = script.make_env

    def make_watched(*args):
        env = make_env(*args)
        env_step = env.step

        def step(action):
            on_step()
            return env_step(action)

        env.step = step
        return env

    with mock.patch.object(script, "make_env", make_watched):
        yield
