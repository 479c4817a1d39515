"""Useful tokens per second of training, ours and MiniMind's own scripts, on the same rows in one run:

    python tests/bench/bench_training.py --corpus CORPUS --tokenizer DIR --minimind CHECKOUT [--stages pretrain,dpo]

A 26M-class model (hidden 512, 8 layers, 8 heads, 4 key/value heads, SwiGLU 1,664, MiniMind's 6,400 tokens), each side
in one process with all cores, data included. MiniMind's scripts run with their defaults (batch size, accumulation,
sequence length), from random weights; ours in a plain process with packs of 4,096 tokens. Useful tokens are those of
documents, padding is none. Rounds alternate; the first steps of each process are warm-up and are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minimind_ray.config.load import load_config
from minimind_ray.data.encode import encode_rows
from minimind_ray.data.pack import Document
from minimind_ray.data.records import discover, read_rows
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.stages.run import begin, prepare_job, resolve_paths, run_here
from minimind_ray.train.run import RunDirectory, versions
from minimind_ray.train.throughput import measure_matmul_flops, training_flops_per_token

WARM_UP = 2


@dataclass(frozen=True)
class Stage:
    """Where its rows lie in the corpus, MiniMind's script and defaults, and our tokens per optimizer step."""

    files: str
    script: str
    max_seq_len: int
    batch_rows: int
    our_batch: int


STAGES = {
    "pretrain": Stage("pretrain/train-*.jsonl", "train_pretrain.py", 340, 32, 24576),
    "sft": Stage("sft/train-*.jsonl", "train_full_sft.py", 768, 16, 4096),
    "lora": Stage("sft/train-*.jsonl", "train_lora.py", 340, 32, 4096),
    "dpo": Stage("dpo/train-*.jsonl", "train_dpo.py", 1024, 4, 4096),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind; without it ours alone is measured")
    parser.add_argument("--stages", default="pretrain,sft,lora,dpo")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="MiniMind steps to time in a round, after the warm-up")
    parser.add_argument("--our-steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()

    import torch

    limits = {
        str(d).removeprefix("torch."): measure_matmul_flops(torch.device("cpu"), d, 1.0) / 1e9
        for d in (torch.float32, torch.bfloat16)
    }
    print(f"{os.cpu_count()} cores; matrix products: " + ", ".join(f"{d} {v:,.0f} GFLOP/s" for d, v in limits.items()))
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        for name in args.stages.split(","):
            results[name] = measure(name, STAGES[name], args, Path(scratch), base)
            show(name, results[name], limits["bfloat16"] * 1e9)
    if args.json:
        facts = {"cores": os.cpu_count(), "matmul_gflops": limits, "versions": versions(), "results": results}
        args.json.write_text(json.dumps(facts, indent=2))


def measure(name: str, stage: Stage, args: argparse.Namespace, scratch: Path, base: Path) -> dict:
    rows_wanted = stage.batch_rows * (args.steps + WARM_UP + 1)
    lines: list[str] = []
    for source in discover(str(args.corpus / stage.files)):
        lines += Path(source.path).read_text(encoding="utf-8").splitlines()
    rows = scratch / f"{name}.jsonl"
    rows.write_text("".join(line + "\n" for line in lines[:rows_wanted]), encoding="utf-8")
    everything = scratch / f"{name}-all.jsonl"
    everything.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    tokenizer = Tokenizer.load(args.tokenizer)
    config = load_config(name, overrides={"data.max_seq_len": stage.max_seq_len}).data
    documents = [g for s in discover(str(rows)) for g in encode_rows(name, read_rows(s), tokenizer, config)]
    tokens = sum(len(d.tokens) for group in documents for d in group)
    assert all(isinstance(d, Document) for group in documents for d in group)
    if not base.exists():
        make_base(args.tokenizer, base)
    ours, theirs = [], []
    for i in range(args.rounds):
        if args.minimind:
            theirs.append(run_minimind(stage, args, rows, scratch / f"minimind-{name}") * tokens / len(documents))
        ours.append(run_ours(name, stage, args, everything, scratch / f"ours-{name}-{i}", base))
    return {"ours": ours, "minimind": theirs, "mean_document": tokens / sum(map(len, documents))}


def make_base(tokenizer: Path, directory: Path) -> None:
    """Random weights for the stages that need some."""
    import torch

    from minimind_ray.config.schema import ModelConfig
    from minimind_ray.model.checkpoint import save_model
    from minimind_ray.model.transformer import Transformer

    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(preset="minimind-3-small").shape(6400)), Tokenizer.load(tokenizer), directory)


def run_ours(name: str, stage: Stage, args: argparse.Namespace, rows: Path, out: Path, base: Path) -> float:
    """Useful tokens per second of our loop after the warm-up: packs read, trained on, weights updated."""
    settings = {
        "data.train": str(rows), "data.val_fraction": 0.0, "data.max_seq_len": stage.max_seq_len,
        "data.cache_dir": str(rows.parent / "cache"), "batch.tokens": stage.our_batch,
        "model.preset": "minimind-3-small", "train.max_steps": WARM_UP + args.our_steps,
        "train.compile": args.compile, "out": str(out),
        "checkpoint.every": 10**6, "track.wandb": "off", "lora.rank": 16,
    }  # fmt: skip
    if name == "pretrain":
        settings["data.tokenizer"] = str(args.tokenizer)
    else:
        settings["init_from"] = str(base)
    code = "import sys, json; from tests.bench.bench_training import train; train(json.loads(sys.argv[1]), sys.argv[2])"
    root = str(Path(__file__).parents[2])
    # As theirs in a process of its own, so that neither inherits the other's memory and threads.
    subprocess.run(
        [sys.executable, "-c", code, json.dumps(settings), name], check=True, cwd=root, stdout=subprocess.DEVNULL
    )
    timings = [(m["tokens"], m["timing"]["seconds"]) for m in RunDirectory(out).metrics()]
    counted = timings[WARM_UP:]
    return (counted[-1][0] - timings[WARM_UP - 1][0]) / sum(seconds for _, seconds in counted)


def train(settings: dict, name: str) -> None:
    """In the process of its own."""
    job = prepare_job(resolve_paths(load_config(name, overrides=settings)))
    begin(job, resume=False)
    run_here(job)


def run_minimind(stage: Stage, args: argparse.Namespace, rows: Path, out: Path) -> float:
    """Rows per second of MiniMind's script after the warm-up, read off its log lines."""
    command = [
        sys.executable, "-u", stage.script, "--data_path", str(rows), "--hidden_size", "512", "--device", "cpu",
        "--epochs", "1", "--log_interval", "1", "--num_workers", "0", "--save_interval", "1000000",
        "--from_weight", "none", "--save_dir", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=args.minimind / "trainer", stdout=subprocess.PIPE, text=True)
    assert process.stdout
    times: list[float] = []
    try:
        for line in process.stdout:
            if re.match(r"Epoch:\[1/1\]\(\d+/\d+\)", line):
                times.append(time.perf_counter())
                if len(times) > WARM_UP + args.steps:
                    break
    finally:
        process.kill()
        process.wait()
    if len(times) < WARM_UP + 2:
        raise SystemExit(f"{stage.script} logged only {len(times)} steps; run it by hand to see why: {command}")
    return stage.batch_rows * (len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


def show(name: str, result: dict, limit: float) -> None:
    from minimind_ray.config.schema import ModelConfig

    shape = ModelConfig(preset="minimind-3-small").shape(6400)
    ceiling = limit / training_flops_per_token(shape, result["mean_document"] / 2)
    ours = statistics.median(result["ours"])
    line = f"{name:9} ours {ours:8,.0f} useful tokens/s ({ours / ceiling:.0%} of the matrix-product limit)"
    if result["minimind"]:
        theirs = statistics.median(result["minimind"])
        line += f"   MiniMind {theirs:7,.0f}   ratio {ours / theirs:.1f}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
