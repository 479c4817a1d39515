"""Train on three nodes of this machine while a random worker or node is killed every 20 to 60 seconds.

    python -m tests.bench.soak --minutes 30

First quiet runs of the same length, one with the same seed and others for the spread of the final loss, then the run
that is harmed. Says at its end whether every pack was trained on exactly once, whether the final validation loss is
that of the quiet run with the same seed to within the spread between seeds, and how the memory of the driver moved.
Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from minimind_ray.config.load import to_yaml
from minimind_ray.stages.run import run_here
from minimind_ray.stages.verify import check_checkpoint
from minimind_ray.train.run import RunDirectory
from tests.faults import WORKER, LocalCluster, logged
from tests.jobs import make_config, make_job, start

TWIN = 1  # The seed of the harmed run and of the quiet run that it has to equal.


def rss_mb(process: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def final_loss(run: Path) -> float:
    """Of the last validation."""
    return [line["val/loss"] for line in RunDirectory(run).metrics() if "val/loss" in line][-1]


def harm(cluster: LocalCluster, draws: random.Random) -> str:
    """Kill a worker, or take a node away and give another one; what was done."""
    if draws.random() < 0.5 and (workers := cluster.processes(WORKER)):
        os.kill(draws.choice(workers), signal.SIGKILL)
        return "a worker"
    cluster.lose(draws.choice(cluster.nodes))
    cluster.add(1)
    return "a node"


def main(words: list[str]) -> int:
    """Run, print what was seen, and judge: 0 if all is well, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--steps", type=int, help="length of the runs; default: what keeps the time filled")
    parser.add_argument("--quiet-seeds", type=int, default=3, help="quiet runs, one of them the harmed run's twin")
    parser.add_argument("--between", type=float, nargs=2, default=(20, 60), help="seconds from one kill to the next")
    parser.add_argument("--kills", type=int, default=math.inf, help="at most so many; default: no limit")
    parser.add_argument("--rows", type=int, default=16000, help="rows of made-up text to train on")
    parser.add_argument("--seed", type=int, default=0, help="draws what is killed, and when")
    arguments = parser.parse_args(words)
    if arguments.quiet_seeds < 2:
        parser.error("--quiet-seeds: two at least, for the spread between them")
    with tempfile.TemporaryDirectory() as name:
        return soak(Path(name), arguments)


def soak(directory: Path, arguments: argparse.Namespace) -> int:
    """See the module's text."""
    torch.set_num_threads(1)  # As many as each of the three workers has.
    settings = {"rows": arguments.rows, "batch__tokens": 2048, "eval__samples": 0, "data__val_fraction": 0.1}
    steps = arguments.steps or steps_for(directory, settings, arguments.minutes)
    settings |= {
        "train__max_steps": steps,
        "eval__every": max(1, steps // 5),
        "checkpoint__every": max(1, steps // 200),
        # A slow machine loses more before it has a checkpoint; that a run gives up in time is not the question here.
        "scale__max_failures": 1000,
    }
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        seeds = [TWIN, *range(TWIN + 1, TWIN + arguments.quiet_seeds)]
        quiet = list(processes.map(partial(quiet_run, directory, settings), seeds))
    for seed, loss in zip(seeds, quiet, strict=True):
        print(f"quiet run, seed {seed}: loss {loss:.5f} after {steps} steps", flush=True)

    run, draws = directory / "soak", random.Random(arguments.seed)
    settings |= {"train__seed": TWIN, "scale__workers": "1:3", "scale__resize_seconds": 15}
    config = make_config(directory, out=str(run), **settings)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    cluster = LocalCluster(head_cpus=2)
    began, memory, kills, sizes = time.monotonic(), [], [], set()
    try:
        cluster.add(1)
        cluster.add(1)
        command = ["train", "pretrain", "--config", str(directory / "config.yaml")]
        with cluster.driver(*command, log=directory / "log") as driver:
            due = time.monotonic() + draws.uniform(*arguments.between)
            while driver.poll() is None:
                time.sleep(1)
                memory.append(rss_mb(driver.pid))
                sizes.add(len(cluster.processes(WORKER)))
                more = len(kills) < arguments.kills and time.monotonic() - began < 60 * arguments.minutes
                if more and time.monotonic() > due:
                    kills.append(harm(cluster, draws))
                    print(f"{time.monotonic() - began:6.0f} s  step {logged(run)}: {kills[-1]} lost", flush=True)
                    due = time.monotonic() + draws.uniform(*arguments.between)
            code = driver.returncode
    finally:
        cluster.shutdown()

    minutes = (time.monotonic() - began) / 60
    restarts = len(RunDirectory(run).info().get("restarts", []))
    print(f"{minutes:.1f} minutes: {kills.count('a worker')} workers and {kills.count('a node')} nodes killed, "
          f"{restarts} restarts, {sorted(sizes - {0})} workers at a time")  # fmt: skip
    if code:
        print((directory / "log").read_text(encoding="utf-8")[-2000:])
        return 1
    logged_steps = [line["step"] for line in RunDirectory(run).metrics()]
    whole = logged_steps == list(range(1, steps + 1))
    findings = {finding.check: finding for finding in check_checkpoint(RunDirectory(run).checkpoints()[-1])}
    loss, spread = final_loss(run), max(quiet) - min(quiet)
    near = abs(loss - quiet[0]) <= spread
    settled = memory[len(memory) // 4 :]
    halves = [statistics.median(half) for half in (settled[: len(settled) // 2], settled[len(settled) // 2 :])]
    print(f"metrics    {'each step once' if whole else 'steps missing or twice'}")
    print(f"ledger     {findings['ledger'].detail}")
    print(f"loss       {loss:.5f}, twin {quiet[0]:.5f}, between seeds {spread:.5f}: {'within' if near else 'off'}")
    print(f"driver RSS {halves[0]:.0f} MB, later {halves[1]:.0f} MB (medians), {max(memory):.0f} MB at most")
    return int(
        not (whole and near and all(finding.ok for finding in findings.values()) and halves[1] < 1.1 * halves[0])
    )


def quiet_run(directory: Path, settings: dict, seed: int) -> float:
    """The final loss of a run of that seed which nothing happens to."""
    torch.set_num_threads(1)
    own = directory / f"quiet-{seed}"  # Others make the same data beside.
    own.mkdir()
    job = make_job(own, out=str(own / "run"), train__seed=seed, **settings)
    start(job)
    run_here(job)
    return final_loss(Path(job.config.out))


def steps_for(directory: Path, settings: dict, minutes: float) -> int:
    """Steps that take about a third of the time when nothing happens; the rest goes to restarts."""
    job = make_job(directory, out=str(directory / "pace"), train__max_steps=60, **settings)
    start(job)
    run_here(job)
    seconds = [line["timing"]["seconds"] for line in RunDirectory(Path(job.config.out)).metrics()]
    # Three workers share this machine's cores, and each restart does a few steps again.
    return max(60, int(60 * minutes / 3 / statistics.median(seconds)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
