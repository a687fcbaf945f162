"""Runs of the scripts, unchanged, that are held now and then, or short to be measured."""

import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

FIT_EVERY, FIT_UPDATES = 25, 50  # ten times as frequent and as short as the scripts' defaults


class Held(threading.Thread):
    """A function in a thread of its own, which goes on only while resume() waits for it."""

    def __init__(self, function: Callable[[], object], name: str | None = None):
        super().__init__(name=name, daemon=True)
        self.function, self.given, self.told = function, SimpleQueue(), SimpleQueue()
        self.start()

    def run(self) -> None:
        self.given.get()
        try:
            self.function()
            self.told.put(None)
        except BaseException as error:
            self.told.put(error)

    def resume(self, given=None):
        """Has hold() return `given`; returns what the function next holds with, None at its end."""
        self.given.put(given)
        if isinstance(told := self.told.get(), BaseException):
            raise told
        return told

    def hold(self, told):
        """Called by the function: waits for resume(), and returns what that is given."""
        self.told.put(told)
        return self.given.get()


def short_run(args, **changes):
    """The settings of a run to be measured: nothing is evaluated or saved, fits are short."""
    wanted = {"eval_frequency": 0, "checkpoint_frequency": 0, "model_train_frequency": FIT_EVERY}
    wanted |= {"model_first_updates": FIT_UPDATES, "model_updates": FIT_UPDATES} | changes
    return replace(args, **{name: value for name, value in wanted.items() if name in vars(args)})
