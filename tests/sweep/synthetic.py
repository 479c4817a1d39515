"""A sweep on disk as minimind-ray tune leaves it, made of numbers whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from minimind_ray.config.load import load_config, to_yaml
from minimind_ray.sweep.axes import Axis, parse_axis, plan_trials
from minimind_ray.sweep.trials import Session, SweepInfo

SAMPLES = [
    "The fox by the river says: <b>kindness</b> & patience cost little.",
    "春风又绿江南岸，明月何时照我还。狐狸在桥边看月亮。",
    "Q: What is the tallest mountain?\nA: I am not sure, but I can look it up with you.",
]
BEGAN, CLOCK, PLACES = datetime(2026, 11, 24, 8, tzinfo=UTC), 1200.0, 2
BETA_LR = {"dpo.beta": "0.02,0.05,0.1,0.3", "optim.lr": "1e-6,1e-5"}


def dpo_quality(point: dict[str, Any]) -> float:
    """True mean margin: a hump in beta, and more with the higher learning rate."""
    return 0.9 - 0.15 * abs(math.log10(point["dpo.beta"] / 0.1)) + (0.3 if point.get("optim.lr", 0) > 3e-6 else 0.0)


def make_sweep(
    directory: Path,
    *,
    stage: str = "dpo",
    axes: dict[str, Any] = BETA_LR,
    metric: str = "val/loss",
    mode: str = "min",
    seeds: int = 2,
    draws: int | None = None,
    examples: int = 240,
    steps: int = 60,
    quality: Callable[[dict[str, Any]], float] = dpo_quality,
    seed_noise: float = 0.03,
    failed: int | None = None,
    stopped: int | None = None,
    running: int | None = None,
    price_per_hour: float | None = None,
    example_seed: int = 1,
    samples: list[str] = SAMPLES,
) -> Path:
    """`failed`, `stopped` and `running` are numbers of trials that ended so. For token losses quality is the loss."""
    base = load_config(stage, overrides={"data.train": "data/train.jsonl", "data.tokenizer": "tokenizer"})
    parsed: list[Axis] = [parse_axis(key, spec) for key, spec in axes.items()]
    trials = plan_trials(base, parsed, draws=draws, seeds=seeds)
    directory.mkdir(parents=True)
    info = SweepInfo(
        stage=stage,
        metric=metric,
        mode="min" if mode == "min" else "max",
        axes={axis.key: axis.to_json() for axis in parsed},
        seeds=seeds,
        shared={"prepared datasets": 2, "base weights put in the object store": 1, "reference log-probabilities": 1200},
        created=BEGAN.isoformat(),
        config=base.model_dump(mode="json"),
        price_per_hour=price_per_hour,
        sessions=[Session(began=BEGAN, ended=BEGAN + timedelta(seconds=CLOCK), places=PLACES)],
    )
    (directory / "sweep.json").write_text(info.model_dump_json(indent=2), encoding="utf-8")

    shared = np.random.default_rng(example_seed)
    ease_E, length_E = shared.normal(0, 1, examples), shared.integers(8, 120, examples)
    for i, trial in enumerate(trials):
        path = directory / "trials" / trial.id
        path.mkdir(parents=True)
        rng = np.random.default_rng([example_seed, i])
        seed_effect = 0.02 * trial.seed + rng.normal(0, seed_noise)
        level = quality(trial.point) + seed_effect
        state = {failed: "failed", stopped: "early-stopped", running: "running"}.get(i, "finished")
        done = steps if state == "finished" else steps * 2 // 5
        progress = done / steps
        if stage == "dpo":
            level = 0.2 + (level - 0.2) * progress**0.5
            margin_E = level + 0.9 * ease_E + rng.normal(0, 0.25, examples)
            columns = {
                "loss": np.logaddexp(0, -margin_E), "count": np.ones(examples),
                "margin": margin_E, "accuracy": (margin_E > 0).astype(float),
            }  # fmt: skip
        else:
            level += 4 * (1 - progress)
            loss_E = length_E * (level + 0.4 * ease_E) + rng.normal(0, 0.3, examples) * np.sqrt(length_E)
            columns = {"loss": loss_E, "count": length_E.astype(float), "bytes": 3.0 * length_E}
        final = columns["loss"].sum() / columns["count"].sum()

        (path / "trial.json").write_text(json.dumps({"id": trial.id, "point": trial.point, "seed": trial.seed}))
        (path / "config.yaml").write_text(to_yaml(trial.config), encoding="utf-8")
        start = 0.6931 if stage == "dpo" else final + 4
        with (path / "metrics.jsonl").open("w") as f:
            for step in range(1, done + 1):
                loss = final + (start - final) * math.exp(-5 * step / done)
                line: dict[str, Any] = {"step": step, "tokens": step * 32768, "epoch": 0, "lr": 1e-5}
                line |= {"loss": loss + rng.normal(0, 0.02 + 0.02 * loss), "grad_norm": 1.0}
                line["timing"] = {"seconds": 1.5 + 0.2 * rng.random(), "tokens_per_second": 2e4, "mfu": 0.3}
                if step % (steps // 10) == 0 or step == done:
                    line["val/loss"] = loss if step < done else final
                    line["timing"]["validation_seconds"] = 0.5
                    if stage == "dpo":
                        line["val/accuracy"] = float(columns["accuracy"].mean()) * (0.9 + 0.1 * step / done)
                        line["val/margin"] = float(columns["margin"].mean()) * step / done
                    else:
                        line["val/bits_per_byte"] = line["val/loss"] / math.log(2) / 3
                f.write(json.dumps(line) + "\n")
        run = {"state": state, "inputs": {"data.val": f"cache/{stage}-{example_seed}", "init_from": None}}
        if state == "failed":
            run["error"] = f"step {done}: the loss is nan and the gradient norm inf; training stopped"
        if state != "running":
            run |= {"steps": done, "tokens": done * 32768}
        if state in ("finished", "early-stopped"):
            run["result"] = f"checkpoints/step-{done:08d}"
            pq.write_table(pa.table({"example": np.arange(examples), **columns}), path / "validation.parquet")
        (path / "run.json").write_text(json.dumps(run))
        with (path / "samples.jsonl").open("w", encoding="utf-8") as f:
            prompts = [f"{number}. {text[:60]}" for number, text in enumerate(samples, 1)]
            for step in (0, done // 2, done):
                where = f"{trial.id}, step {step}" if step else "before training"
                texts = [f"{prompt}\n{text} ({where})" for prompt, text in zip(prompts, samples)]
                line = {"step": step, "samples": texts, "prompts": prompts}
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
    return directory


def make_full_sweep(directory: Path) -> Path:
    """8 points with 2 seeds, one trial failed, one stopped early."""
    return make_sweep(directory, failed=3, stopped=8, price_per_hour=1.8)
