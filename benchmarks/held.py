"""Runs of the scripts, unchanged, that are held now and then."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

FIT_EVERY, FIT_UPDATES = 25, 50  # where speed is measured: a tenth of the scripts' defaults


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
