"""What each choice in how the updates are computed is worth on this machine, on its own.

    python benchmarks/variants.py [--rounds 9] [--threads 2]

SAC updates and model updates at walker-run's sizes, as mbpo_ftfl.py ships them and with one thing
changed; all in one process, in turn, round after round. Writes variants_<device>.csv and .md into
benchmarks/results/throughput/; ratios are taken round by round.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from common import RESULTS, InputError, load_script, markdown, run_tool
from peers.serve import timed
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm
from updates import Updates

SIZES, GRAPH = (24, 6), 4  # of walker-run's states and actions; updates in a longer graph
SHIPPED, DEFAULT = "as shipped", "products by torch's default"
UNMARKED, UNGUARDED = "addresses not marked as fixed", "guards of the graphs not evaluated"
LONGER = f"{GRAPH} updates in one graph"


@dataclass
class Options:
    rounds: int = 9  # turns of each variant
    seconds: float = 2.0  # length of a turn
    threads: int = 2  # threads of PyTorch
    device: Literal["cpu", "cuda"] = "cpu"  # where it is measured
    out: Path = RESULTS / "throughput"  # folder of the results


def beside(function, state, *inputs):
    """Keeps the old state, and copies the new one over it afterwards, outside the graph."""
    new, metrics = function(state, *inputs)
    tree_map(Tensor.copy_, state, new)
    return metrics


def several(function, state, *inputs):
    """GRAPH updates in one graph."""
    for _ in range(GRAPH):
        state, metrics = function(state, *inputs)
    return state, metrics


class SeparateCritics(nn.ModuleList):
    """The twin critics as two networks, one after the other."""

    def __init__(self, mlp, inputs: int):
        super().__init__(mlp(inputs, 1) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.stack([q(x).squeeze(-1) for q in self])


def variants(script, device: str) -> dict:
    """By kind and variant, a function that does some updates and says how many."""
    torch._dynamo.config.recompile_limit = 64  # as all variants share in_place
    own = {"isolate_recompiles": True} if torch.__version__ >= "2.13" else {}  # graphs of each
    jit = partial(script.setup_torch(script.Args(), torch.device(device)), **own)
    graph, in_place = partial(jit, mode="reduce-overhead"), partial(partial, script.in_place)
    builds = {name: lambda f: graph(in_place(f)) for name in (SHIPPED, DEFAULT, UNMARKED)}
    builds |= {
        UNGUARDED: builds[SHIPPED],
        "new state beside the old": lambda f: partial(beside, jit(f)),
        "inductor's C++ wrapper": lambda f: jit(in_place(f), options={"cpp_wrapper": True}),
        LONGER: lambda f: graph(in_place(partial(several, f))),
        "uncompiled": in_place,
    }
    made = {}
    for kind in ("SAC", "model"):
        for name, build in builds.items():
            work = Updates(script, script.Args(), SIZES, device, build, fixed=name != UNMARKED)
            made[kind, name] = getattr(work, kind.lower())()
    work = Updates(script, script.Args(), SIZES, device, builds[SHIPPED])
    work.nets["critic"] = SeparateCritics(script.mlp, sum(SIZES))
    return made | {("SAC", "critics one after the other"): work.sac()}


def measure(options: Options) -> pd.DataFrame:
    """Updates per second of each kind and variant, a row for each round."""
    rows, turns = [], variants(load_script("mbpo_ftfl.py"), options.device)
    shipped = torch.get_float32_matmul_precision()
    for number in tqdm(range(options.rounds + 1), unit="round"):  # in round 0 all is compiled
        for (kind, name), once in turns.items():
            torch.set_float32_matmul_precision("highest" if name == DEFAULT else shipped)
            torch.compiler.set_stance(skip_guard_eval_unsafe=name == UNGUARDED and number > 0)
            if number == 0:
                once()
                continue
            count, seconds = timed(once, options.seconds)
            rate = count * (GRAPH if name == LONGER else 1) / seconds
            rows.append({"round": number, "kind": kind, "variant": name, "rate": rate})
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> str:
    """Medians, and ratios to what is shipped, in Markdown."""
    wide, lines = frame.pivot(index="round", columns=["kind", "variant"], values="rate"), []
    for kind, name in wide:
        ratio = wide[kind, name] / wide[kind, SHIPPED]
        line = {"update": kind, "variant": name, "per second": wide[kind, name].median()}
        line |= {"over the one shipped": f"{ratio.median():.2f}"}
        lines.append(line | {"range": f"{ratio.min():.2f} to {ratio.max():.2f}"})
    return markdown(pd.DataFrame(lines))


def run(options: Options) -> None:
    """Measures, prints and writes."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is none here")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    frame = measure(options)
    path = options.out / f"variants_{options.device}"
    frame.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    path.with_suffix(".md").write_text(table(frame) + "\n")
    print(table(frame))


if __name__ == "__main__":
    run_tool(run, Options, __doc__)
