"""Show the progress and the result of a run. Read both from the run's directory, wherever the run's processes are."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from minimind_ray.config.search import TASK_PREFIX
from minimind_ray.config.stages import StageRecord
from minimind_ray.config.trackers import tracker_folders
from minimind_ray.data.background import in_background
from minimind_ray.data.files import join
from minimind_ray.data.storage import StoreError
from minimind_ray.stages.run import Job
from minimind_ray.sweep.text import duration_text, shorten
from minimind_ray.track.registry import send_commands
from minimind_ray.train.run import RunDirectory

LONGEST_SAMPLE = 400
"""The most letters that are printed of a prompt with its answer."""


@contextmanager
def watching(job: Job, console: Console) -> Generator[None]:
    """Show metrics.jsonl in a thread: one moving line on a terminal, a line per validation elsewhere."""
    config, plan = job.config, job.plan
    console.print(
        f"{config.stage}: {plan.steps} steps of {config.batch.tokens:,} tokens, {config.scale.workers} worker(s) "
        f"-> {config.out}",
        highlight=False,
        soft_wrap=True,
    )
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar,
        in_background(partial(_follow, job, bar, console), "follower"),
    ):
        yield


def _follow(job: Job, bar: Progress, console: Console, stop: threading.Event) -> None:
    steps = job.plan.steps
    task = bar.add_task(job.config.stage, total=steps, line="starting")
    run, position, began = RunDirectory(job.config.out), 0, time.time()
    while True:
        ending = stop.wait(run.poll_seconds)
        try:
            path = run.live_file("metrics.jsonl", began)
        except StoreError:  # The run itself reports errors of the store.
            if ending:
                return
            continue
        if path.exists():
            if path.stat().st_size < position:
                position = 0  # A restart removed the lines after the checkpoint. Read the file from its beginning.
            with path.open(encoding="utf-8") as f:
                f.seek(position)
                while (line := f.readline()).endswith("\n"):
                    try:
                        metrics = json.loads(line)
                    except ValueError:  # An incomplete line: the file was replaced during the read.
                        break
                    position = f.tell()
                    bar.update(task, completed=metrics["step"], line=progress_line(metrics, steps))
                    if "warning" in metrics:
                        console.print(f"warning: {metrics['warning']}", highlight=False, markup=False, soft_wrap=True)
                    if "val/loss" in metrics:
                        # A terminal wraps the line between words; a log gets one line.
                        text = validation_line(metrics, steps, job.config.record)
                        console.print(text, highlight=False, soft_wrap=not console.is_terminal)
        if ending:
            return


def progress_line(metrics: dict[str, Any], steps: int) -> str:
    """Return step, loss, learning rate, tokens per second, MFU and time left as text."""
    timing = metrics["timing"]
    return (
        f"step {metrics['step']}/{steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
        f"{timing['tokens_per_second']:,.0f} tok/s  MFU {timing['mfu']:.0%}  "
        f"{duration_text(timing['seconds_left'])} left"
    )


def validation_line(metrics: dict[str, Any], steps: int, record: StageRecord) -> str:
    """Return the progress line with the validation's loss, perplexity, the stage's metrics, and the benchmarks."""
    found = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
    shown = dict.fromkeys(["loss", "perplexity", *(name.removeprefix("val/") for name in record.metrics)])
    values = "  ".join(f"{name.replace('_', ' ')} {found[name]:.4g}" for name in shown if name in found)
    values += "".join(f"  {name} {value:.4g}" for name, value in metrics.items() if name.startswith(TASK_PREFIX))
    return f"{progress_line(metrics, steps)}  | validation: {values}"


def print_result(out: str, console: Console) -> None:
    """Print how the run ended, the samples, and the model's directory."""
    run = RunDirectory(out)
    info = run.info()
    console.print(f"{info['state']} after {info['steps']} steps, {info['tokens']:,} tokens", highlight=False)
    for samples in [line for line in run.samples() if line["step"]][-1:]:
        for text in samples["samples"]:
            console.print(f"  sample: {shorten(text, LONGEST_SAMPLE)!r}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"model: {join(run.where, info['result'])}", highlight=False, soft_wrap=True)
    if run.mirror:
        for folder in tracker_folders():
            run.mirror.pull(folder)
    for title, command in send_commands(run.path).items():
        console.print(f"{title}, stored offline: {command}", highlight=False, soft_wrap=True)
    if info["state"] == "stopped":
        console.print("to continue, use the same command with --resume", highlight=False)
