"""LoRA trials per hour on one device: one process that trains K together, against runs of their own.

A trial is `--trial-steps` optimizer steps of one pack and a validation, from its start to its result on disk. Separate
runs go one after another in this process with all threads, or side by side in as many processes as there are cores (on
a GPU `--places`), with their share of the threads; and in each of those processes K are trained together, as `tune`
does it. Processes are started and warm before the clock runs. The base has random weights, which cost the same.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from argparse import Namespace
from pathlib import Path

import torch

from minimind_ray.config.load import load_config
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.model.checkpoint import read_weights, save_model
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.fused import member
from minimind_ray.stages.run import Job, begin, prepare_job, run_here
from minimind_ray.train.context import default_device, keep_freed_memory, resolve_precision
from minimind_ray.train.fused import Lockstep, PlainFusedContext
from tests.bench.common import Report, first_rows, tokenizer


def measure_fused(args: Namespace, report: Report, scratch: Path) -> None:
    keep_freed_memory()
    for preset, tokens in itertools.product(args.presets.split(","), map(int, args.tokens.split(","))):
        directory = scratch / f"fused-{preset}-{tokens}"
        directory.mkdir()
        report.put("fused", f"{preset}/{tokens}", measure(args, preset, tokens, directory))


def measure(args: Namespace, preset: str, tokens: int, scratch: Path) -> dict[str, float]:
    """Trials per hour, by way of training."""
    loaded = tokenizer(args)
    rows = first_rows(args, "lora", 600, scratch / "rows.jsonl")
    shape = load_config("sft", overrides={"model.preset": preset}).model.shape(loaded.vocab_size)
    save_model(Transformer(shape), loaded, scratch / "base")
    numbers = itertools.count()

    def jobs(count: int) -> list[Job]:
        made: list[Job] = []
        for seed in range(count):
            settings = {
                "init_from": str(scratch / "base"), "data.train": str(rows), "data.cache_dir": str(scratch / "cache"),
                "data.max_seq_len": min(tokens, 512), "data.pack_tokens": tokens, "batch.tokens": tokens,
                "data.val_fraction": 0.02, "train.max_steps": args.trial_steps, "train.seed": seed,
                "track.wandb": "off", "optim.lr": 1e-3 * (seed + 1), "lora.rank": 8, "lora.targets": args.targets,
                "eval.samples": 0, "eval.every": args.trial_steps, "out": str(scratch / f"run-{next(numbers)}"),
            }  # fmt: skip
            made.append(prepare_job(resolve_paths(load_config("lora", overrides=settings))))
            begin(made[-1], resume=False)
        return made

    def hourly(count: int, seconds: float) -> float:
        return 3600 * count / seconds

    run_here(jobs(1)[0])
    found: dict[str, float] = {}
    start = time.perf_counter()
    some = jobs(args.separate)
    start = time.perf_counter()
    for job in some:
        run_here(job)
    found["one after another"] = hourly(len(some), time.perf_counter() - start)

    threads = max(1, (os.cpu_count() or 1) // args.places)
    with multiprocessing.get_context("spawn").Pool(args.places, torch.set_num_threads, (threads,)) as pool:

        def side_by_side(together: int) -> float:
            some = [jobs(together) for _ in range(args.places * max(1, args.separate // args.places // together))]
            start = time.perf_counter()
            pool.map(train_together if together > 1 else run_one, some, chunksize=1)
            return hourly(together * len(some), time.perf_counter() - start)

        side_by_side(1)
        found["side by side"] = side_by_side(1)
        for count in map(int, args.together.split(",")):
            found[f"{count} together"] = side_by_side(count)
    best = max(found["one after another"], found["side by side"])
    print(f"{preset}, {tokens} tokens a step: trials per hour, and against the better of the separate ways", flush=True)
    for way, rate in found.items():
        print(f"  {way:>18} {rate:8,.0f}  {rate / best:5.2f}", flush=True)
    return found


def run_one(jobs: list[Job]) -> None:
    """In a process of its own."""
    run_here(jobs[0])


def train_together(jobs: list[Job]) -> None:
    """In one process."""
    device = default_device()
    assert jobs[0].config.init_from
    weights = {name: tensor.to(device) for name, tensor in read_weights(jobs[0].config.init_from).items()}
    lockstep = Lockstep(weights, device, resolve_precision("auto", device))
    for job in jobs:
        lockstep.add(member(job, PlainFusedContext(weights, device)))
    while lockstep.members:
        for ended in lockstep.turn():
            assert ended.error is None
