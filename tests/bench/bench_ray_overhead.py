"""What Ray Train costs over the same loop in a plain process: seconds to the first step, and per step.

    python tests/bench/bench_ray_overhead.py --corpus CORPUS --tokenizer DIR [--preset small] [--steps 30]

The same job on prepared data, one worker with the same threads, alternating; start-up counts from the command's
start to the end of the first step (imports, Ray's start and the workers' included).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minimind_ray.train.run import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"--no-ray": [], "--ray": []}
    with tempfile.TemporaryDirectory() as scratch:
        run(args, "--no-ray", Path(scratch), "warm")  # Prepares the data.
        for i in range(args.rounds):
            for host, results in found.items():
                results.append(run(args, host, Path(scratch), f"{host}-{i}"))
    for host, results in found.items():
        startup, step = (statistics.median(column) for column in zip(*results))
        print(f"{host:9} first step after {startup:5.1f} s, then {step * 1000:7.1f} ms a step")
    plain, ray = (statistics.median(step for _, step in found[host]) for host in ("--no-ray", "--ray"))
    print(f"Ray Train costs {ray / plain - 1:+.1%} per step")


def run(args: argparse.Namespace, host: str, scratch: Path, name: str) -> tuple[float, float]:
    """(seconds to the end of the first step, median seconds of the later steps)."""
    out = scratch / name
    command = [
        str(Path(sys.executable).with_name("minimind-ray")), "train", "pretrain", host, "--out", str(out),
        "--train", str(args.corpus / "pretrain" / "train-00000-of-00008.jsonl"), "--tokenizer", str(args.tokenizer),
        "--preset", args.preset, "--batch-tokens", "8192", "--max-steps", str(args.steps),
        "--cpus-per-worker", str(args.threads), "--set", "data.val_fraction=0",
        "--set", "checkpoint.every=1000000",
        "--set", f"data.cache_dir={scratch}/cache",
    ]  # fmt: skip
    start = time.time()
    # A plain process takes all cores unless it is told its share, as a Ray worker is.
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    startup = time.time() - start
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    seconds = [m["timing"]["seconds"] for m in RunDirectory(out).metrics()]
    return startup, statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
