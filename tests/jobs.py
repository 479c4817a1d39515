"""Small real runs for tests: jsonl files, a tokenizer trained on them, and jobs over them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from minimind_ray.config.load import load_config
from minimind_ray.config.schema import Config
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.tokenizer import train_tokenizer
from minimind_ray.stages.run import Job, begin, prepare_job

NOUNS = ["river", "mountain", "fox", "poem", "lantern", "winter", "bridge", "月", "山", "春风"]
VERBS = ["sees", "follows", "remembers", "forgets", "likes", "爱", "看"]


def sentence(random_: random.Random) -> str:
    return " ".join(
        f"{random_.choice(NOUNS)} {random_.choice(VERBS)} {random_.choice(NOUNS)}."
        for _ in range(random_.randint(1, 9))
    )


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(stage: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the stage's format; answers follow from questions, so that there is something to learn."""
    r = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        text, other, noun = sentence(r), sentence(r), r.choice(NOUNS)
        question = {"role": "user", "content": f"What about the {noun}? {text}"}
        if stage == "pretrain":
            rows.append({"text": text})
        elif stage == "dpo":
            answer, worse = (
                {"role": "assistant", "content": c} for c in (f"The {noun} is good.", f"I dare not say: {other}")
            )
            rows.append({"chosen": [question, answer], "rejected": [question, worse]})
        else:
            rows.append({"conversations": [question, {"role": "assistant", "content": f"The {noun} {text}"}]})
    return rows


def make_tokenizer(directory: Path) -> Path:
    texts = [row["text"] for row in rows_of("pretrain", 300)]
    train_tokenizer(texts, vocab_size=400).save(directory)
    return directory


def make_job(directory: Path, stage: str = "pretrain", rows: int = 400, **overrides: Any) -> Job:
    """A prepared job of the config that `make_config` makes."""
    return prepare_job(make_config(directory, stage, rows, **overrides))


def make_config(directory: Path, stage: str = "pretrain", rows: int = 400, **overrides: Any) -> Config:
    """The config of a tiny model on a few rows in `directory`; overrides by dotted key, with __ for the dot."""
    source = write_jsonl(directory / f"{stage}.jsonl", rows_of(stage, rows))
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        make_tokenizer(tokenizer)
    settings: dict[str, Any] = {
        "data.train": str(source), "data.val_fraction": 0.1, "data.tokenizer": str(tokenizer),
        "data.cache_dir": str(directory / "cache"), "data.max_seq_len": 64, "data.pack_tokens": 256,
        "data.direct_steps": 4,
        "batch.tokens": 1024, "optim.lr": 3e-3, "train.precision": "float32",
        "eval.samples": 0, "eval.sample_tokens": 8, "out": str(directory / f"run-{stage}"),
    }  # fmt: skip
    if "init_from" not in overrides:
        settings["model.preset"] = "tiny"
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return resolve_paths(load_config(stage, overrides=settings))


def start(job: Job, *, resume: bool = False) -> Path:
    """Make the run directory; its path."""
    return begin(job, resume=resume).path
