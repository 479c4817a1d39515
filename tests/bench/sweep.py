"""What a sweep costs over its training: DPO trials, 2 at once on 1 core each, against as many `train dpo` commands.

The sweep's wall clock is set against the sum of its trials' training steps, as metrics.jsonl has them, over 2 (perfect
packing would give 1.00); everything else a trial does (loading, validating twice, checkpoints, its turn in Tune) and
the start of the two processes is overhead. Ray's own start is measured apart. The commands run one after another,
each on both cores. Data and reference log-probabilities are made before, for both.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from minimind_ray.config.load import load_config
from minimind_ray.config.search import SearchConfig
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.on_ray.session import ray_running
from minimind_ray.stages.run import prepare_job
from minimind_ray.sweep.axes import parse_axis
from minimind_ray.sweep.plan import plan_sweep
from minimind_ray.sweep.run import run_sweep
from minimind_ray.train.run import RunDirectory
from tests.bench.common import Report, first_rows
from tests.bench.training import make_base


def measure_sweep(args: Namespace, report: Report, scratch: Path) -> None:
    betas = [float(beta) for beta in args.betas.split(",")]
    points = list(itertools.product(betas, range(args.seeds)))
    base_model = args.base or scratch / "base"
    if not args.base:
        make_base(args, "tiny", base_model)
    rows = (
        first_rows(args, "dpo", args.pairs + 200, scratch / "pairs.jsonl").read_text(encoding="utf-8").splitlines(True)
    )
    (scratch / "train.jsonl").write_text("".join(rows[:-200]), encoding="utf-8")
    (scratch / "val.jsonl").write_text("".join(rows[-200:]), encoding="utf-8")
    config = scratch / "dpo.yaml"
    config.write_text(
        f"init_from: {base_model.absolute()}\n"
        f"data: {{train: {scratch}/train.jsonl, val: {scratch}/val.jsonl, cache_dir: {scratch}/cache, "
        "max_seq_len: 512, pack_tokens: 2048}\n"
        "batch: {tokens: 8192}\noptim: {lr: 1.0e-5}\neval: {samples: 0}\n"
    )
    base = resolve_paths(load_config("dpo", [config]))
    every = prepare_job(base).plan.steps // 2 + 1
    settings = ["--set", f"eval.every={every}"]

    start = time.perf_counter()
    with ray_running(2):
        print(f"Ray's start {time.perf_counter() - start:.1f} s")
        search = SearchConfig(seeds=args.seeds)
        eval_ = base.eval.model_copy(update={"every": every})
        plan = plan_sweep(
            scratch / "sweep", base.model_copy(update={"eval": eval_}), [parse_axis("dpo.beta", betas)], search
        )
        begun: dict[Path, float] = {}
        ended: dict[Path, float] = {}

        def watch(trial: Path, event: str, metrics: object) -> None:
            if event == "started":
                begun[trial] = time.perf_counter()
            elif event == "ended":
                ended[trial] = time.perf_counter()

        start = time.perf_counter()
        run_sweep(plan, resume=False, say=print, watch=watch)
        wall = time.perf_counter() - start
    assert len(ended) == len(points)
    steps = sum(training_seconds(trial) for trial in ended)
    trials = sum(ended[trial] - begun[trial] for trial in ended)
    print(
        f"sweep: {wall:.1f} s; training steps {steps:.1f} s, trials from start to end {trials:.1f} s in all; "
        f"wall / (steps / 2) = {2 * wall / steps:.3f}, wall / (trials / 2) = {2 * wall / trials:.3f}; "
        f"the first trial began after {min(begun.values()) - start:.1f} s"
    )

    seconds = {"sweep": wall, "steps of trials": steps}
    for host in ("--ray", "--no-ray"):
        start, steps = time.perf_counter(), 0.0
        for beta, seed in points:
            out = scratch / f"{host}-{beta}-{seed}"
            command = [
                sys.executable, "-m", "minimind_ray", "train", "dpo", host, "--config", str(config),
                "--beta", str(beta), "--seed", str(seed), "--out", str(out), "--cpus-per-worker", "2", *settings,
            ]  # fmt: skip
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            steps += training_seconds(out)
        commands = f"{len(points)} x train dpo {host}"
        seconds[commands] = separate = time.perf_counter() - start
        print(f"{commands}: {separate:.1f} s, of it steps {steps:.1f} s; the sweep takes {wall / separate:.0%} of that")
    report.put("sweep", "seconds", seconds)


def training_seconds(run: Path) -> float:
    """Of all optimizer steps."""
    return sum(line["timing"]["seconds"] for line in RunDirectory(run).metrics())
