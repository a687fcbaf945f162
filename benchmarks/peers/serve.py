"""How throughput.py speaks with a contender: lines of JSON over stdin and a pipe.

{"task": "sac"} sets a task up and does it twice; the answer tells the package's version and the
seconds that this took, most of which are compilation. {"task": "sac", "seconds": 3} goes on with it
for so long; the answer is {"count": ..., "seconds": ...}. What goes wrong is {"error": ...}.
In between, the contender waits for the next line, and does nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

BATCH, UPDATES, FILLED = 256, 20, 100_000  # transitions per update, updates per step, in the buffer


def setting() -> dict:
    """What the command line says: env_id, obs, action (sizes of the two), device, script."""
    return json.loads(sys.argv[1])


def channel() -> tuple[Iterator[dict], Callable]:
    """The requests, and a function that answers one."""
    out = os.fdopen(int(os.environ["ANSWERS"]), "w")
    return map(json.loads, sys.stdin), lambda **fields: print(json.dumps(fields), file=out, flush=1)


def serve(setups: dict, package: str, synchronize=lambda: None, compiled=None) -> None:
    """Serves tasks: each setup returns a function that does some units of work, and says how many.

    `synchronize` waits until the device has done what it was given; `compiled` holds the seconds of
    compilation of tasks that were compiled before.
    """
    requests, answer = channel()
    tasks = {}
    for request in requests:
        name, begin, count = request["task"], time.perf_counter(), 0
        try:
            if "seconds" not in request:
                begin -= (compiled or {}).get(name, 0)
                tasks[name] = setups[name]()
                tasks[name](), tasks[name]()
            while time.perf_counter() - begin < request.get("seconds", 0):
                count += tasks[name]()
            synchronize()
            took = time.perf_counter() - begin
            answer(count=count, seconds=took, version=version(package))
        except Exception as error:  # whatever a library raises
            answer(error=repr(error).splitlines()[0])
