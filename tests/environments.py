"""Small tasks with one fault or oddity each: --env-id environments:NAME-v0."""

import random

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box

LATE = 60  # steps of an instance, one of which tries it out, after which a late fault shows
SMALL, LARGE = Box(-1, 1, (1,), np.float32), Box(-np.inf, np.inf, (3,), np.float32)


class Plain(gym.Env):
    """A state of three numbers that random pushes move; the first of them is the reward.

    Observation, reward and flag are functions of the state and of whether it is late.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    dt = 0.01  # seconds of a step, as MuJoCo's tasks say it

    def __init__(
        self,
        render_mode=None,
        actions=SMALL,
        observations=LARGE,
        draw=None,
        observe=lambda state, late: state.copy(),
        reward=lambda state, late: float(state[0]),
        ended=lambda state, late: False,
    ):
        self.render_mode, self.steps = render_mode, 0
        self.action_space, self.observation_space = actions, observations
        self.draw = draw or (lambda: self.np_random.normal(size=3))
        self.observe, self.reward, self.ended = observe, reward, ended

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.draw().astype(np.float32)
        return self.observe(self.state, self.steps > LATE), {}

    def step(self, action):
        self.steps += 1
        self.state *= np.float32(0.9)
        self.state += np.float32(0.1) * self.draw().astype(np.float32)
        now = self.state, self.steps > LATE
        return self.observe(*now), self.reward(*now), self.ended(*now), False, {}

    def render(self):
        return np.full((16, 16, 3), self.steps % 256, np.uint8)


class StrictBounds(Plain):
    def __init__(self):
        super().__init__(actions=Box(np.float32(-3), np.float32(0.6), (1,)))

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return super().step(action)


class OldReset(Plain):
    def reset(self, **options):
        return super().reset(**options)[0]


class OldStep(Plain):
    def step(self, action):
        return super().step(action)[:4]


class LateError(Plain):
    def step(self, action):
        if self.steps >= LATE:
            raise RuntimeError("the physics is lost")
        return super().step(action)


for each in (StrictBounds, OldReset, OldStep, LateError):
    gym.register(f"{each.__name__}-v0", each, max_episode_steps=20)
for name, given in {
    "Plain-v0": {},
    "SameArray-v0": {"observe": lambda state, late: state},
    "NegativeStride-v0": {"observe": lambda state, late: state[::-1].copy()[::-1]},
    "ArrayReward-v0": {"reward": lambda state, late: state[:1].copy()},
    "IntegerAction-v0": {"actions": Box(0, 10, (1,), np.int64)},
    "FixedAction-v0": {"actions": Box(np.float32([-1, 2]), np.float32([1, 2]))},
    "MatrixAction-v0": {"actions": Box(-1, 1, (2, 2))},
    "UnboundedAction-v0": {"actions": Box(-np.inf, np.inf, (60,))},
    "ChosenAction-v0": {"actions": gym.spaces.Discrete(3)},
    "NumpysGenerator-v0": {"draw": lambda: np.random.normal(size=3)},
    "PythonsGenerator-v0": {"draw": lambda: np.array([random.gauss(0, 1) for _ in range(3)])},
    "TorchsGenerator-v0": {"draw": lambda: torch.randn(3).numpy()},
    "LongObservation-v0": {"observe": lambda state, late: np.resize(state, 4)},
    "LateLongObservation-v0": {"observe": lambda state, late: np.resize(state, 3 + late)},
    "LateText-v0": {"reward": lambda state, late: "much" if late else 0.0},
    "LateNanReward-v0": {"reward": lambda state, late: np.nan if late else 0.0},
    "OneStep-v0": {"ended": lambda state, late: True},
    "LateEnd-v0": {"ended": lambda state, late: late},
    # Stands as HEALTHY says of Hopper that it must to go on, and goes on where it lies, too.
    "Hopper-v99": {"observe": lambda state, late: np.float32([0.5 if late else 1, 0, 0])},
}.items():
    gym.register(name, Plain, max_episode_steps=20, kwargs=given)
