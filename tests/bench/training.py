"""Training side by side on the same rows: ours, MiniMind's scripts, trl.

Every side runs in a process of its own with all cores or the GPU, data, backward pass and optimizer included, in turns
(`--rounds`). A step that ends within `--warm-up` seconds of the first is not counted; after that each side runs for
`--seconds`, and at least two steps. Useful tokens are the positions of documents: padding is none. MiniMind's scripts
run with their defaults (batch, accumulation, sequence length, precision) from random weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_ray.config.load import load_config
from minimind_ray.config.schema import ModelConfig, ModelShape
from minimind_ray.data.encode import RowEncoder
from minimind_ray.data.records import Reject, discover, read_rows
from minimind_ray.train.throughput import parameter_counts, training_flops_per_token
from tests.bench.common import GpuMemory, Report, ask, child, first_rows, tokenizer


@dataclass(frozen=True)
class Stage:
    """MiniMind's script with its defaults, and our tokens per step on a CPU."""

    script: str
    max_seq_len: int
    batch_rows: int
    our_batch: int
    rows: int
    """So many are trained on (trl computes the reference for each pair when it starts)."""


STAGES = {
    "pretrain": Stage("train_pretrain.py", 340, 32, 24576, 8192),
    "sft": Stage("train_full_sft.py", 768, 16, 4096, 8192),
    "lora": Stage("train_lora.py", 340, 32, 4096, 8192),
    "dpo": Stage("train_dpo.py", 1024, 4, 4096, 256),
}
SIZES = {  # Hidden size, layers, experts: MiniMind's scripts derive the rest, and so does `model_settings`.
    "tiny": (64, 2, 0),
    "26m": (512, 8, 0),
    "64m": (768, 8, 0),
    "104m": (768, 13, 0),  # 101M: MiniMind-2's 104M has another shape, which its present code does not make.
    "moe": (768, 8, 4),
}
SIDES = ("ours", "minimind", "trl")
LORA_RANK = 16  # MiniMind's
GPU_BATCH = 131072


def model_settings(size: str) -> dict[str, Any]:
    """Section model for one of the sizes, as MiniMind's code fills it in."""
    hidden, layers, experts = SIZES[size]
    return {
        "preset": "minimind-3-moe" if experts else "minimind-3", "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": math.ceil(hidden * math.pi / 64) * 64,
    }  # fmt: skip


def measure_training(args: Namespace, report: Report, scratch: Path) -> None:
    limits = report.limits(args.probe_seconds)
    print(
        f"{limits['device']}: matrix products bf16 {limits['bfloat16_flops'] / 1e9:,.0f}, float32 "
        f"{limits['float32_flops'] / 1e9:,.0f} GFLOP/s; copying {limits['copy_bytes'] / 1e9:,.1f} GB/s",
        flush=True,
    )
    for size in args.models.split(","):
        base = scratch / f"base-{size}"
        make_base(args, size, base)
        products = {
            "model": model_settings(size), "vocab_size": tokenizer(args).vocab_size,
            "tokens": GPU_BATCH if limits["device"] == "cuda" else 4096, "seconds": args.probe_seconds,
        }  # fmt: skip
        products = ask("tests.bench.sides", "products", json.dumps(products))
        for stage in args.stages.split(","):
            cell = measure_cell(stage, size, args, scratch, base, limits)
            cell["products_seconds"] = products["frozen" if stage == "lora" else "seconds"]
            report.put("training", f"{size}/{stage}", cell)
            print(cell_line(size, stage, cell), flush=True)
    if "gpu" in report.content["about"]["machine"]:
        estimate_zero(args, report)


def make_base(args: Namespace, size: str, out: Path) -> None:
    """A model of random weights."""
    settings = {"tokenizer": str(args.tokenizer), "model": model_settings(size), "out": str(out)}
    ask("tests.bench.sides", "base", json.dumps(settings))


def measure_cell(
    stage: str, size: str, args: Namespace, scratch: Path, base: Path, limits: dict[str, Any]
) -> dict[str, Any]:
    """All sides on one stage and one model."""
    facts = STAGES[stage]
    rows = first_rows(args, stage, args.rows or facts.rows, scratch / f"{stage}.jsonl")
    tokens, positions, mean_context = row_tokens(stage, rows, args)
    shape = ModelConfig(**model_settings(size)).shape(tokenizer(args).vocab_size)
    settings = our_settings(stage, size, args, scratch, rows, base, limits["device"])
    prepared = ask("tests.bench.sides", "prepare", json.dumps({"stage": stage, "settings": settings}))
    theirs = {
        "stage": stage, "rows": str(rows), "base": str(base), "max_seq_len": facts.max_seq_len, "rank": LORA_RANK,
        "out": str(scratch / "trl"),
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides.split(",")}
    for turn in range(args.rounds):
        for side, results in found.items():
            parse: Callable[[str], float | None] = as_number
            if side == "ours":
                one = {**settings, "out": str(scratch / f"ours-{size}-{stage}-{turn}")}
                process = child("tests.bench.sides", "ours", json.dumps({"stage": stage, "settings": one}))
            elif side == "trl":  # It counts a document's last token too, which is no input.
                process = child("tests.bench.sides", "trl", json.dumps(theirs))
                parse = scaled(positions / tokens)
            else:
                process = start_minimind(facts, size, args, rows, scratch, limits["device"])
                parse = count_minimind(facts.batch_rows * positions)
            if result := watch(process, parse, args):
                results.append(result)
    return {
        "sides": {side: results for side, results in found.items() if results},
        "prepare_seconds": prepared["seconds"], "parameters": parameter_counts(shape)[0],
        "flops_per_token": flops_per_token(shape, stage, mean_context),
        "limit_flops": max(limits["bfloat16_flops"], limits["float32_flops"]),
        "document_tokens": positions,
    }  # fmt: skip


def row_tokens(stage: str, rows: Path, args: Namespace) -> tuple[float, float, float]:
    """Tokens and positions (a document's last token is no input) of a mean row, and the mean context of a token.

    Texts over the sequence length are cut here, as MiniMind does; ours are split, so that no token is lost.
    """
    overrides = {"data.max_seq_len": STAGES[stage].max_seq_len, "data.long_documents": "truncate"}
    config = load_config(stage, overrides=overrides).data
    groups = [
        group
        for source in discover(str(rows))
        for group in RowEncoder(stage, tokenizer(args), config).encode(read_rows(source))
        if not isinstance(group, Reject)
    ]
    lengths = [len(document.tokens) for group in groups for document in group]
    context = sum(n * n for n in lengths) / sum(lengths) / 2
    return sum(lengths) / len(groups), (sum(lengths) - len(lengths)) / len(groups), context


def flops_per_token(shape: ModelShape, stage: str, mean_context: float) -> float:
    """Of forward and backward."""
    return training_flops_per_token(shape, mean_context, frozen=stage == "lora")


def our_settings(
    stage: str, size: str, args: Namespace, scratch: Path, rows: Path, base: Path, device: str
) -> dict[str, Any]:
    facts = STAGES[stage]
    settings: dict[str, Any] = {
        "data.train": str(rows), "data.val_fraction": 0.0, "data.max_seq_len": facts.max_seq_len,
        "data.cache_dir": str(scratch / "cache"), "batch.tokens": facts.our_batch, "train.max_steps": 10**6,
        "train.compile": not args.eager, "checkpoint.every": 10**6, "track.wandb": "off",
    }  # fmt: skip
    if stage == "lora":
        settings["lora.rank"] = LORA_RANK
    if device == "cuda":
        settings |= {"batch.tokens": GPU_BATCH, "scale.gpus_per_worker": 1}
    if stage == "pretrain":
        settings |= {f"model.{key}": value for key, value in model_settings(size).items()}
        settings["data.tokenizer"] = str(args.tokenizer)
    else:
        settings["init_from"] = str(base)
    return settings


def start_minimind(
    facts: Stage, size: str, args: Namespace, rows: Path, scratch: Path, device: str
) -> subprocess.Popen[str]:
    hidden, layers, experts = SIZES[size]
    command = [
        sys.executable, "-u", facts.script, "--data_path", rows, "--hidden_size", hidden, "--num_hidden_layers", layers,
        "--use_moe", int(experts > 0), "--epochs", "1000", "--save_interval", "1000000",
        # Its log waits for the GPU.
        "--log_interval", "1" if device == "cpu" else "10",
        "--from_weight", "none", "--save_dir", scratch / "minimind",
    ]  # fmt: skip
    if device == "cpu":  # Its data workers would take the cores from the model.
        command += ["--device", "cpu", "--num_workers", "0"]
    return subprocess.Popen(
        [*map(str, command)], cwd=args.minimind / "trainer", stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def count_minimind(tokens_per_step: float) -> Callable[[str], float | None]:
    """Tokens so far at each line that it logs."""

    def parse(line: str) -> float | None:
        found = re.match(r"Epoch:\[(\d+)/\d+\]\((\d+)/(\d+)\)", line)
        if not found:
            return None
        epoch, step, steps = map(int, found.groups())
        return ((epoch - 1) * steps + step) * tokens_per_step

    return parse


def scaled(factor: float) -> Callable[[str], float | None]:
    def parse(line: str) -> float | None:
        value = as_number(line)
        return None if value is None else value * factor

    return parse


def as_number(line: str) -> float | None:
    try:
        return float(line)
    except ValueError:
        return None


def watch(
    process: subprocess.Popen[str], parse: Callable[[str], float | None], args: Namespace
) -> dict[str, float] | None:
    """Time a trainer by the lines it prints until it has run long enough, then end it; None if it ended before."""
    started = time.perf_counter()
    events: list[tuple[float, float]] = []
    assert process.stdout
    with GpuMemory() as gpu:
        try:
            for line in process.stdout:
                tokens = parse(line)
                if tokens is None:
                    continue
                events.append((time.perf_counter() - started, tokens))
                first = warm(events, args.warm_up)
                if len(events) - first > 2 and events[-1][0] - events[first][0] >= args.seconds:
                    break
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            _, _, usage = os.wait4(process.pid, 0)
    first = warm(events, args.warm_up)
    if len(events) - first < 3:
        print(f"left out, for it made {len(events)} steps only; run it by hand: {process.args}", file=sys.stderr)
        return None
    (start, before), (end, after) = events[first], events[-1]
    return {
        "tokens_per_second": (after - before) / (end - start), "first_step_seconds": events[0][0],
        "steps": len(events) - 1 - first, "memory_bytes": usage.ru_maxrss * 1024, "gpu_memory_bytes": gpu.most,
    }  # fmt: skip


def warm(events: list[tuple[float, float]], seconds: float) -> int:
    """The last step that ended within `seconds` of the first: counting begins after it."""
    return max((i for i, (at, _) in enumerate(events) if at - events[0][0] <= seconds), default=0)


def rate(results: list[dict[str, float]]) -> float:
    """Useful tokens/s in a side's best turn, since others may be at work beside."""
    return max(r["tokens_per_second"] for r in results)


def first_step(results: list[dict[str, float]]) -> float:
    """Seconds from the process's start to the end of its first step."""
    return statistics.median(r["first_step_seconds"] for r in results)


def peak_memory(results: list[dict[str, float]]) -> float:
    """GiB, of the GPU where there is one."""
    return max(r["gpu_memory_bytes"] or r["memory_bytes"] for r in results) / 2**30


def cell_line(size: str, stage: str, cell: dict[str, Any]) -> str:
    """A line of the table."""
    ceiling = cell["limit_flops"] / cell["flops_per_token"]
    parts = [f"{size:5} {stage:9}"]
    ours = rate(cell["sides"]["ours"]) if "ours" in cell["sides"] else None
    for side, results in cell["sides"].items():
        text = f"{side} {rate(results):9,.0f} tok/s ({rate(results) / ceiling:4.0%} of the top rate, "
        text += f"{rate(results) * cell['products_seconds']:4.0%} of its products') "
        text += f"{first_step(results):5.1f} s {peak_memory(results):4.1f} GiB"
        parts.append(text + (f" ours x{ours / rate(results):.1f}" if ours and side != "ours" else ""))
    return " | ".join(parts)


def table(report: Report) -> str:
    """Every cell of the report, in Markdown."""
    lines = [
        "| model | stage | ours: useful tokens/s (of the top rate, of its products') | MiniMind | ratio | trl | ratio "
        "| first step after, s (ours, MiniMind, trl) | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, cell in report.content.get("training", {}).items():
        size, stage = key.split("/")
        ceiling = cell["limit_flops"] / cell["flops_per_token"]
        sides = [cell["sides"].get(side) for side in SIDES]
        ours = rate(sides[0]) if sides[0] else math.nan
        row = [size, stage, f"{ours:,.0f} ({ours / ceiling:.0%}, {ours * cell['products_seconds']:.0%})"]
        for results in sides[1:]:
            row += [f"{rate(results):,.0f}", f"{ours / rate(results):.1f}"] if results else ["", ""]
        row.append(", ".join(f"{first_step(results):.1f}" if results else "" for results in sides))
        row.append(", ".join(f"{peak_memory(results):.1f}" if results else "" for results in sides))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def estimate_zero(args: Namespace, report: Report) -> None:
    """How long `experiments/zero.yaml` would take at MiniMind's sizes, from the rates of its model and this corpus's
    tokens per byte. An estimate: that text is other text."""
    hours = 0.0
    for stage, size in (("pretrain", args.pretrain_gb), ("sft", args.sft_gb)):
        cell = report.content["training"].get(f"64m/{stage}")
        if cell is None or "ours" not in cell["sides"]:
            return
        per_byte = tokens_per_byte(stage, args)
        hours += 2 * size * 1e9 * per_byte / rate(cell["sides"]["ours"]) / 3600
        print(f"zero.yaml: {stage} on {size} GB at {per_byte:.3f} tokens a byte, 2 epochs: {hours:.2f} h so far")
    report.put("zero", "hours", hours)


def tokens_per_byte(stage: str, args: Namespace) -> float:
    """Over some of the corpus's rows, JSON included."""
    source = discover(str(args.corpus / stage / "*train*.jsonl"))[0]
    config = load_config(stage).data
    groups = RowEncoder(stage, tokenizer(args), config).encode(read_rows(source))
    return sum(len(d.tokens) for group in groups if not isinstance(group, Reject) for d in group) / source.size
