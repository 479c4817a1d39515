"""What a checkpoint costs training: the pause of its step, and all until the file is there.

A plain process trains on random text. The host notes the time of every step; steps of which none is slowed down by a
checkpoint give the usual time, and what the others take longer is what checkpoints cost. The part of training time is
for one checkpoint a minute.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from minimind_ray.stages.run import begin
from minimind_ray.train.context import PlainContext
from minimind_ray.train.run import RunDirectory
from tests.bench.common import Report
from tests.jobs import make_job

BETWEEN = 8


class Clock(PlainContext):
    """Notes when each step begins."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def should_stop(self) -> bool:
        """Asked once in every step."""
        self.steps.append(time.perf_counter())
        return False


def measure_checkpoint(args: Namespace, report: Report, scratch: Path) -> None:
    steps = BETWEEN * (args.checkpoints + 2)
    job = make_job(
        scratch / "checkpoint", rows=2000, model__preset=args.checkpoint_preset, model__vocab_size=6400,
        data__val_fraction=0.0, batch__tokens=256, train__epochs=20, train__max_steps=steps, checkpoint__every=BETWEEN,
        track__wandb="off", out=str(args.checkpoint_out or scratch / "checkpoint" / "run"),
    )  # fmt: skip
    begin(job, resume=False)
    clock = Clock()
    job.run(clock, job.data(clock))
    checkpoint = RunDirectory(job.config.out).checkpoints()[-1]
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    # Row: the steps from one checkpoint to the next, the first of them with the pause of the checkpoint at its front.
    seconds = np.diff(clock.steps)[BETWEEN - 1 :]
    seconds = seconds[: len(seconds) // BETWEEN * BETWEEN].reshape(-1, BETWEEN)[1:]
    usual = np.median(seconds[:, BETWEEN // 2 :])
    pause, whole = np.median(seconds[:, 0]) - usual, np.median(seconds.sum(1)) - BETWEEN * usual
    print(f"checkpoint of {size / 1e6:.0f} MB, a usual step {usual:.3f} s, {len(seconds)} checkpoints, medians:")
    print(f"pause of the step      {pause:.3f} s   {pause / 60:.2%} of training time at one a minute")
    print(f"cost until it is there {whole:.3f} s   {whole / 60:.2%}")
    report.put("checkpoint", "seconds", {"bytes": size, "step": usual, "pause": pause, "until it is there": whole})
