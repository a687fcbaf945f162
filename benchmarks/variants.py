"""What each choice in how the updates are computed is worth on this machine, on its own.

    python benchmarks/variants.py [--rounds 9] [--threads 2]

SAC updates and model updates at walker-run's sizes, as mbpo_ftfl.py ships them and with one thing
changed; all in one process, in turn, round after round. Writes variants_<device>.csv and .md into
benchmarks/results/throughput/; ratios are taken round by round.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import mbpo_ftfl as script  # noqa: E402

S, A, B, GRAPH = 24, 6, 256, 4  # walker-run's sizes, the batch; updates in a longer graph
SHIPPED, DEFAULT = "as shipped", "products by torch's default"
UNMARKED, UNGUARDED = "addresses not marked as fixed", "guards of the graphs not evaluated"
torch._dynamo.config.recompile_limit = 64  # as all variants share in_place
own = {"isolate_recompiles": True} if torch.__version__ >= "2.13" else {}  # graphs of each alone
jit = partial(torch.compile, fullgraph=True, dynamic=False, **own)
graph = partial(jit, mode="reduce-overhead")


@dataclass
class Options:
    rounds: int = 9  # turns of each variant
    seconds: float = 2.0  # length of a turn
    threads: int = 2  # threads of PyTorch
    device: str = "cpu"  # cpu or cuda
    out: Path = ROOT / "benchmarks" / "results" / "throughput"  # folder of the results


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

    def __init__(self):
        super().__init__(script.mlp(S + A, 1) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.stack([q(x).squeeze(-1) for q in self])


def variants(function) -> dict:
    """Name of a variant: its update of (state, *inputs) in place, and the updates in a call."""
    in_place = partial(partial, script.in_place)
    return {
        SHIPPED: (graph(in_place(function)), 1),
        DEFAULT: (graph(in_place(function)), 1),
        UNMARKED: (graph(in_place(function)), 1),
        UNGUARDED: (graph(in_place(function)), 1),
        "new state beside the old": (partial(beside, jit(function)), 1),
        "inductor's C++ wrapper": (jit(in_place(function), options={"cpp_wrapper": True}), 1),
        f"{GRAPH} updates in one graph": (graph(in_place(partial(several, function))), GRAPH),
        "uncompiled": (in_place(function), 1),
    }


def turns_of(device: torch.device) -> dict:
    """By kind and variant: update in place, state, inputs, updates in a call."""
    torch.manual_seed(0)
    args, on, turns = script.Args(), {"device": device}, {}
    nets = {"actor": script.mlp(S, 2 * A), "critic": script.Critic(S, A)}
    net = script.Ensemble(args.ensemble_size, S + A, S + 1, args.model_hidden)
    rows = script.ReplayBuffer(B, S, A, device)
    batch = rows.unpack(torch.randn(B, 2 * S + A + 2, **on).clamp(-1, 1))
    inputs = {"SAC": [batch, torch.randn(2, B, A, **on)]}
    inputs["model"] = [torch.randn(args.ensemble_size, B, n, **on) for n in (S + A, S + 1)]
    sac = partial(script.sac_update, nets=nets, args=args)
    model = partial(script.model_update, net=net, args=args)
    states = {"SAC": script.sac_init(nets, 1.0, device), "model": script.adam_init(net, device)}
    for kind, function in {"SAC": sac, "model": model}.items():
        for name, (update, updates) in variants(function).items():
            state = tree_map(torch.clone, states[kind])
            turns[kind, name] = update, state, inputs[kind], updates
    nets = nets | {"critic": SeparateCritics()}
    update = graph(partial(script.in_place, script.sac_update, nets=nets, args=args))
    agent = script.sac_init(nets, 1.0, device)
    return turns | {("SAC", "critics one after the other"): (update, agent, inputs["SAC"], 1)}


def measure(options: Options) -> pd.DataFrame:
    """Updates per second of each kind and variant, a row for each round."""
    device, rows = torch.device(options.device), []
    turns = turns_of(device)
    for (_, name), (_, state, *_) in turns.items():
        if name != UNMARKED:
            tree_map(torch._dynamo.mark_static_address, state)
    for number in tqdm(range(options.rounds + 1), unit="round"):  # in round 0 all is compiled
        for (kind, name), (update, state, inputs, updates) in turns.items():
            torch.set_float32_matmul_precision("highest" if name == DEFAULT else "medium")
            torch.compiler.set_stance(skip_guard_eval_unsafe=name == UNGUARDED and number > 0)
            count, began = 0, time.perf_counter()
            while count < 3 or (number and time.perf_counter() - began < options.seconds):
                update(state, *inputs)
                count += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = count * updates / (time.perf_counter() - began)
            rows.append({"round": number, "kind": kind, "variant": name, "rate": rate})
    return pd.DataFrame(rows).query("round > 0")


def main() -> None:
    """Measures, prints and writes."""
    options = tyro.cli(Options, description=__doc__)
    there = ["cpu", *["cuda"] * torch.cuda.is_available()]
    for name, holds, wanted in [
        ("rounds", options.rounds >= 1, "at least 1"),
        ("seconds", 0 < options.seconds < 3600, "above 0 and under 3600"),
        ("threads", options.threads >= 1, "at least 1"),
        ("device", options.device in there, f"one that is here ({', '.join(there)})"),
    ]:
        if not holds:
            print(f"error: --{name} must be {wanted}", file=sys.stderr)
            sys.exit(2)
    torch.set_num_threads(options.threads)
    frame = measure(options)
    wide = frame.pivot(index="round", columns=["kind", "variant"], values="rate")
    lines = ["| update | variant | per second | over the one shipped | range |"]
    lines.append("|---|---|---:|---:|---:|")
    for kind, name in wide:
        ratio = wide[kind, name] / wide[kind, SHIPPED]
        cells = f"{wide[kind, name].median():.0f} | {ratio.median():.2f}"
        lines.append(f"| {kind} | {name} | {cells} | {ratio.min():.2f} to {ratio.max():.2f} |")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"variants_{options.device}"
    frame.to_csv(path.with_suffix(".csv"), index=False, float_format="%.6g")
    path.with_suffix(".md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
