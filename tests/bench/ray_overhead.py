"""What Ray Train costs over the same loop in a plain process: seconds to the first step, and per step.

The same job on prepared data, one worker with all cores or all but one, with and without Ray in turns; start-up counts
from the command's start to the end of the first step (imports, Ray's start and the workers' included).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from minimind_ray.train.run import RunDirectory
from tests.bench.common import Report, files


def measure_ray_overhead(args: Namespace, report: Report, scratch: Path) -> None:
    train(args, "--no-ray", scratch, "warm", args.cpus)  # Prepares the data.
    for threads in sorted({args.cpus, max(1, args.cpus - 1)}, reverse=True):
        found: dict[str, list[tuple[float, float]]] = {"--no-ray": [], "--ray": []}
        for i in range(args.rounds):
            for host, results in found.items():
                results.append(train(args, host, scratch, f"{host}-{threads}-{i}", threads))
        medians = {host: [statistics.median(column) for column in zip(*results)] for host, results in found.items()}
        for host, (startup, step) in medians.items():
            print(f"{threads} threads {host:9} first step after {startup:5.1f} s, then {step * 1000:7.1f} ms a step")
        print(f"Ray Train costs {medians['--ray'][1] / medians['--no-ray'][1] - 1:+.1%} per step", flush=True)
        report.put("ray", f"{threads} threads", medians)


def train(args: Namespace, host: str, scratch: Path, name: str, threads: int) -> tuple[float, float]:
    """(seconds to the end of the first step, median seconds of the later steps)."""
    out = scratch / name
    command = [
        sys.executable, "-m", "minimind_ray", "train", "pretrain", host, "--out", out,
        "--train", files(args, "pretrain")[0].path, "--tokenizer", args.tokenizer,
        "--preset", args.preset, "--batch-tokens", "8192", "--max-steps", args.steps,
        "--cpus-per-worker", threads, "--set", "data.val_fraction=0",
        "--set", "checkpoint.every=1000000", "--set", "data.direct_steps=4",
        "--set", f"data.cache_dir={scratch}/cache",
    ]  # fmt: skip
    start = time.time()
    # A plain process takes all cores unless it is told its share, as a Ray worker is.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, env=environment)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    startup = time.time() - start
    if process.wait():
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    seconds = [m["timing"]["seconds"] for m in RunDirectory(out).metrics()]
    return startup, statistics.median(seconds[2:])
