"""How cost grows: tokens/s against workers, document length and pack size as pictures, and a model of many GPUs.

Measured: the optimizer step of a model (`--growth-model`) on made-up tokens, 16,384 a step. Workers are processes with
a share of the cores each; more workers than cores show only what working together costs. Before the gradients are
summed the workers wait for each other, timed as idle; the summing is communication.

Modelled: the step time on 8, 64 and 256 GPUs, see `modelled_step`. That is arithmetic, not a measurement.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minimind_ray.config.schema import ModelConfig, ModelShape, OptimConfig
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.train.context import default_device, keep_freed_memory, resolve_precision
from minimind_ray.train.optim import FlatGradients, build_adamw
from minimind_ray.train.step import training_step
from minimind_ray.train.throughput import parameter_counts
from tests.bench.common import Report, ask, child
from tests.bench.sides import fastest
from tests.bench.training import model_settings, rate

VOCABULARY = 6400
STEP_TOKENS = 16384

GPUS = (1, 8, 16, 32, 64, 128, 256)
GPUS_PER_NODE = 8
NVLINK = 450e9
"""Bytes/s in one direction and per GPU, NVLink 4 as published for H100 and H200."""
LINKS = {"400 Gb/s InfiniBand per GPU": 400e9 / 8, "100 Gb/s Ethernet per node": 100e9 / 8 / GPUS_PER_NODE}
HOP = 10e-6
"""Seconds that a message takes beside its bytes; an assumption."""
H200_TOKENS_PER_SECOND = 956_145
"""Of the 64M model in steps of 131,072 tokens, as docs/performance.md has them measured."""
BATCHES: dict[str, Callable[[int], int]] = {
    "128k tokens per GPU": lambda gpus: gpus * 2**17, "1M tokens in all": lambda gpus: 2**20
}  # fmt: skip
"""Tokens of a step, by the number of GPUs."""


def measure_growth(args: Namespace, report: Report, scratch: Path) -> None:
    found: dict[str, Any] = {"model": args.growth_model, "workers": {}}
    for count in map(int, args.workers.split(",")):
        store = scratch / f"rendezvous-{count}"
        common = {
            "model": args.growth_model, "count": count, "store": str(store), "cpus": args.cpus,
            "steps": args.worker_steps,
        }  # fmt: skip
        workers = [child("tests.bench.growth", "work", json.dumps({**common, "rank": rank})) for rank in range(count)]
        shares = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
        found["workers"][count] = means = {key: float(np.mean([s[key] for s in shares])) for key in shares[0]}
        print(
            f"{count} workers: {means['tokens_per_second']:,.0f} tokens/s, communication {means['communication']:.0%}, "
            f"idle {means['idle']:.0%}",
            flush=True,
        )
    settings = {
        "model": args.growth_model, "seconds": args.point_seconds,
        "lengths": [int(length) for length in args.lengths.split(",")],
        "packs": [int(tokens) for tokens in args.packs.split(",")],
    }  # fmt: skip
    found |= ask("tests.bench.growth", "sizes", json.dumps(settings))
    report.put("growth", "measured", found)
    found["modelled"] = model_of_many(report)
    report.put("growth", "modelled", found["modelled"])
    draw(found, args.plots)


def synthetic_packs(length: int, tokens: int, count: int) -> list[Pack]:
    random = np.random.default_rng(0)
    lengths = np.full(tokens // length, length, np.int32)
    weights = np.ones(tokens, np.uint8)
    weights[::length] = 0
    return [Pack(i, random.integers(0, VOCABULARY, tokens).astype(np.uint16), weights, lengths) for i in range(count)]


def stepper(size: str) -> tuple[FlatGradients, Callable[[list[Pack]], int]]:
    """A model's optimizer step, as the training loop makes it; it returns the tokens of all workers."""
    keep_freed_memory()
    device = default_device()
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**model_settings(size)).shape(VOCABULARY)).to(device)
    optimizer, gradients = build_adamw(model, OptimConfig()), FlatGradients(model)
    objective, dtype = CausalLM(model.shape), resolve_precision("auto", device)

    def step(packs: list[Pack]) -> int:
        batches = [batch_from_packs([pack]) for pack in packs]
        done = training_step(
            model, objective, packs, batches, optimizer, gradients,
            step=0, lr=1e-4, clip=1.0, device=device, dtype=dtype,
        )  # fmt: skip
        return done.tokens

    return gradients, step


def work(model: str, rank: int, count: int, store: str, cpus: int, steps: int) -> dict[str, float]:
    """One worker's tokens/s of all, and the parts of its time that went into communication and waiting."""
    torch.set_num_threads(max(1, cpus // count))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    gradients, step = stepper(model)
    spent = {"communication": 0.0, "idle": 0.0}
    all_reduce = gradients.all_reduce

    def timed() -> None:
        start = time.perf_counter()
        dist.barrier()
        met = time.perf_counter()
        all_reduce()
        spent["idle"] += met - start
        spent["communication"] += time.perf_counter() - met

    gradients.all_reduce = timed
    packs = synthetic_packs(128, 4096, STEP_TOKENS // 4096)[rank::count]
    step(packs)
    spent.update(communication=0.0, idle=0.0)
    start = time.perf_counter()
    tokens = sum(step(packs) for _ in range(steps))
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    return {"tokens_per_second": tokens / seconds, **{name: value / seconds for name, value in spent.items()}}


def sizes(model: str, seconds: float, lengths: list[int], packs: list[int]) -> dict[str, dict[int, float]]:
    """Tokens/s by the documents' length in packs of 4,096 tokens, and by the packs' tokens with documents of 128;
    of the fastest step within `seconds`, since others may be at work beside."""
    _, step = stepper(model)

    def speed(length: int, tokens: int) -> float:
        return (tokens - tokens // length) / fastest(seconds, step, synthetic_packs(length, tokens, 1))

    return {
        "length": {length: speed(length, 4096) for length in lengths},
        "pack_tokens": {tokens: speed(128, tokens) for tokens in packs},
    }


def modelled_step(
    gpus: int, tokens_per_gpu: float, tokens_per_second: float, gradient_bytes: float, link: float
) -> float:
    """Seconds of a step: compute, then the sum of the gradients, since they are summed after the backward pass.

    Within a node a ring's reduce-scatter and all-gather over NVLink, 2 (g - 1) / g of the bytes; between n nodes each
    GPU's g-th part likewise over `link` bytes/s per GPU (Thakur et al. 2005), and a hop's time for every message.
    """
    local = min(gpus, GPUS_PER_NODE)
    nodes = gpus // local
    within = 2 * (local - 1) / local * gradient_bytes / NVLINK
    between = 2 * (nodes - 1) / nodes * gradient_bytes / local / link
    return tokens_per_gpu / tokens_per_second + within + between + 2 * (local - 1 + nodes - 1) * HOP


def model_of_many(report: Report) -> dict[str, Any]:
    """Of the 64M model: tokens/s of one GPU, as this report or an earlier one has them; and the step times."""
    shape: ModelShape = ModelConfig(**model_settings("64m")).shape(VOCABULARY)
    cell = report.content.get("training", {}).get("64m/pretrain")
    measured = report.content.get("limits", {}).get("device") == "cuda" and cell
    speed = rate(cell["sides"]["ours"]) if measured else H200_TOKENS_PER_SECOND
    gradient_bytes = 4 * parameter_counts(shape)[0]
    return {
        "tokens_per_second": speed,
        "basis": f"one GPU's {speed:,.0f} tokens/s were measured{'' if measured else ' on an H200'}",
        "gradient_bytes": gradient_bytes,
        "step_seconds": {
            f"{name}, {kind}": {
                gpus: modelled_step(gpus, tokens(gpus) / gpus, speed, gradient_bytes, link) for gpus in GPUS
            }
            for name, link in LINKS.items()
            for kind, tokens in BATCHES.items()
        },
    }


def draw(found: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (workers, lengths, packs) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    counts = [int(count) for count in found["workers"]]
    bottom = np.zeros(len(counts))
    parts = {name: np.array([w[name] for w in found["workers"].values()]) for name in ("communication", "idle")}
    parts = {"compute": 1 - sum(parts.values()), **parts}
    for (name, values), color in zip(parts.items(), ("#4477aa", "#ee6677", "#ccbb44")):
        workers.bar([str(c) for c in counts], values, bottom=bottom, label=name, color=color, width=0.6)
        bottom += values
    for i, one in enumerate(found["workers"].values()):
        workers.text(i, 1.01, f"{one['tokens_per_second']:,.0f} tok/s", ha="center", va="bottom", fontsize=9)
    workers.set(xlabel="workers on the same cores", ylabel="part of the time", ylim=(0, 1.12))
    workers.legend(loc="lower left", fontsize=8)
    for axes, key, label in (
        (lengths, "length", "document length, tokens"),
        (packs, "pack_tokens", "pack (one forward pass), tokens"),
    ):
        values = found[key]
        axes.plot([int(x) for x in values], [y / 1000 for y in values.values()], "o-", color="#4477aa")
        axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylabel="thousand tokens/s", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"Measured: model {found['model']}", fontsize=11)
    figure.savefig(folder / "growth-measured.png", dpi=80)

    modelled = found["modelled"]
    figure, both = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, (kind, tokens) in zip(both, BATCHES.items()):
        for name, color in zip(LINKS, ("#4477aa", "#ee6677")):
            steps = modelled["step_seconds"][f"{name}, {kind}"]
            axes.plot(GPUS, [tokens(g) / steps[g] / 1e6 for g in GPUS], "o-", color=color, label=name)
        alone = [g * modelled["tokens_per_second"] / 1e6 for g in GPUS]
        axes.plot(GPUS, alone, "--", color="gray", label="no communication")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(GPUS, [str(g) for g in GPUS])
        axes.set(xlabel="GPUs", ylabel="million tokens/s", title=f"{kind} and step")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=8)
    figure.suptitle(f"A model, not a measurement: 64M parameters ({modelled['basis']})", fontsize=11)
    figure.savefig(folder / "growth-modelled.png", dpi=80)


if __name__ == "__main__":
    print(json.dumps({"work": work, "sizes": sizes}[sys.argv[1]](**json.loads(sys.argv[2]))))
