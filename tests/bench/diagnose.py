"""Train ten healthy runs and some that are broken on purpose, and print what `minimind-ray diagnose` finds in each.

    python -m tests.bench.diagnose --out DIR                         # some minutes on 2 cores
    python -m tests.bench.diagnose --out DIR --only overfitting      # one of them, and the runs that it starts from
    python -m tests.bench.diagnose --out DIR --record tests/diagnose/runs.zip

`--record` keeps what the rules read of each run as a file for tests/diagnose. Two of the runs train on the folder
MINIMIND_CORPUS, the others on the demo's world. Runs that are in DIR already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_ray.config.load import load_config
from minimind_ray.data.demo import write_demo
from minimind_ray.data.tokenizer import train_tokenizer
from minimind_ray.diagnose.facts import read_facts
from minimind_ray.diagnose.rules import diagnose
from minimind_ray.on_ray.host import train_stage
from minimind_ray.train.run import RunDirectory

CORPUS_FOLDER = Path(os.environ["MINIMIND_CORPUS"]) if os.environ.get("MINIMIND_CORPUS") else None
COMMON: dict[str, Any] = {
    "data.max_seq_len": 256, "data.pack_tokens": 512, "batch.tokens": 1024, "train.precision": "float32",
    "track.to": [], "checkpoint.keep": 1, "eval.samples": 4, "eval.sample_tokens": 48, "optim.lr": 3e-3,
}  # fmt: skip
SMALL = {
    "model.preset": "small", "model.num_hidden_layers": 2, "model.hidden_size": 256, "model.num_attention_heads": 8,
    "model.intermediate_size": 768,
}  # fmt: skip
PRETRAIN = {**SMALL, "schedule.warmup": 20, "eval.every": 25}
SFT = {"init_from": "pretrain", "schedule.warmup": 10, "train.max_steps": 200, "eval.every": 25}
LORA = {
    "init_from": "sft", "lora.targets": "all-linear", "optim.lr": 2e-2, "schedule.warmup": 5, "train.epochs": 4,
    "eval.every": 10,
}  # fmt: skip
DPO = {
    "init_from": "sft", "data.pack_tokens": 1024, "optim.lr": 5e-5, "train.max_steps": 30, "eval.every": 5,
    "dpo.beta": 0.05,
}  # fmt: skip
CORPUS = {
    "eval.samples": 0,
    "model.preset": "tiny",
    "data.tokenizer": "chinese",
    "batch.tokens": 2048,
    "schedule.warmup": 10,
}
HEALTHY: dict[str, dict[str, Any]] = {
    "pretrain": PRETRAIN,
    "pretrain-wsd": {**PRETRAIN, "train.seed": 1, "optim.lr": 2e-3, "schedule.name": "wsd"},
    "pretrain-linear": {
        **PRETRAIN, "train.seed": 2, "schedule.name": "linear", "optim.lr": 4e-3, "batch.tokens": 2048,
        "model.hidden_size": 192, "model.intermediate_size": 512, "model.num_hidden_layers": 3,
        "model.num_attention_heads": 6,
    },
    "pretrain-corpus": {**CORPUS, "train.max_steps": 150},
    "sft": SFT,
    "sft-slow": {**SFT, "train.seed": 1, "schedule.name": "linear", "optim.lr": 1e-3, "train.max_steps": 150},
    "lora": LORA,
    "lora-square": {**LORA, "train.seed": 1, "lora.targets": "square", "lora.rank": 4, "train.epochs": 3},
    "dpo": DPO,
    "dpo-lora": {**DPO, "train.seed": 1, "dpo.lora": True, "dpo.beta": 0.2, "optim.lr": 1e-2},
}  # fmt: skip
BROKEN: dict[str, dict[str, Any]] = {
    "rate_too_high": {**PRETRAIN, "optim.lr": 0.3, "train.max_steps": 120},
    "rate_too_low": {**PRETRAIN, "optim.lr": 3e-6, "train.max_steps": 120},
    "overfitting": {**SFT, "data.train": "few", "train.max_steps": 100, "eval.every": 10},
    "dpo_nothing_learned": {**DPO, "optim.lr": 1e-9},
    "clipped": {**PRETRAIN, "optim.clip": 0.01, "train.max_steps": 100},
    "tokenizer_misfit": {**PRETRAIN, "data.train": "chinese", "data.tokenizer": "english", "train.max_steps": 100},
    "samples_repeat": {**PRETRAIN, "data.train": "repeated", "train.max_steps": 160},
    "truncated": {**SFT, "data.max_seq_len": 32, "train.max_steps": 60},
    "warmup_too_long": {**PRETRAIN, "schedule.warmup": 80, "train.max_steps": 100},
}
STAGES = ("pretrain", "sft", "lora", "dpo")
OTHER_STAGES = {"overfitting": "sft", "truncated": "sft", "dpo_nothing_learned": "dpo"}
RECORDED = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl")


def stage_of(name: str) -> str:
    """The stage of a run in the tables above."""
    return OTHER_STAGES.get(name) or next((stage for stage in STAGES if name.startswith(stage)), "pretrain")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")


def is_english(text: str) -> bool:
    return text.isascii()


def make_inputs(out: Path) -> None:
    """Write the demo's data, data that break a run, and the tokenizers."""
    data = out / "data"
    if (out / "tokenizer").exists():
        return
    write_demo(data)
    texts = [row["text"] for row in rows(data / "pretrain" / "train.jsonl")]
    english = [text for text in texts if is_english(text)]
    write(data / "few.jsonl", rows(data / "sft" / "train.jsonl")[:20])
    write(data / "chinese.jsonl", [{"text": text} for text in texts if not any(map(str.isascii, text.strip(".。")))])
    write(data / "repeated.jsonl", [{"text": f"{text.split('. ')[0]} " * 12} for text in english[:400]])
    train_tokenizer(english, vocab_size=1000).save(out / "english")
    if CORPUS_FOLDER:
        poems = [row["text"] for row in rows(CORPUS_FOLDER / "pretrain" / "train-00000-of-00008.jsonl")[:4000]]
        train_tokenizer(poems, vocab_size=3000).save(out / "chinese")
    train_tokenizer(texts, vocab_size=2000).save(out / "tokenizer")


def config_of(name: str, out: Path) -> Any:
    """The config of a run in the tables above. Short names of files stand for those that `make_inputs` wrote."""
    stage, settings = stage_of(name), {**COMMON, **{**HEALTHY, **BROKEN}[name]}
    data = out / "data"
    for split in ("train", "val"):
        settings.setdefault(f"data.{split}", str(data / stage / f"{split}.jsonl"))
    if "/" not in settings["data.train"]:
        settings["data.train"] = str(data / f"{settings['data.train']}.jsonl")
        if stage == "pretrain":  # Validated on rows of the same kind.
            settings["data.val"] = None
            settings["data.val_fraction"] = 0.1
    if "init_from" in settings:
        settings["init_from"] = str(out / "runs" / settings["init_from"])
    else:
        settings["data.tokenizer"] = str(out / settings.get("data.tokenizer", "tokenizer"))
    if name.endswith("corpus"):
        assert CORPUS_FOLDER, "needs real text: set MINIMIND_CORPUS"
        corpus = CORPUS_FOLDER / stage
        settings |= {"data.train": str(corpus / "train-00000*.jsonl"), "data.val": str(corpus / "val*.jsonl")}
    settings |= {"data.cache_dir": str(out / "cache"), "out": str(out / "runs" / name)}
    return load_config(stage, overrides=settings)


def train(name: str, out: Path) -> RunDirectory:
    """Train a run, and before it the run that it starts from, unless they are there."""
    settings = {**HEALTHY, **BROKEN}[name]
    if "init_from" in settings:
        train(settings["init_from"], out)
    run = RunDirectory(out / "runs" / name)
    if run.info().get("state") != "finished":
        config = config_of(name, out)
        train_stage(config, resume=run.file("config.yaml").exists(), ray=False)
        if run.info()["state"] != "finished":
            raise SystemExit(f"{name} was stopped")
    return run


def record(runs: list[RunDirectory], out: Path, path: Path) -> None:
    """Keep the files that the rules read in a zip file, without paths of this machine."""
    hidden = {str(out): "/demo", str(CORPUS_FOLDER): "/corpus"}
    with zipfile.ZipFile(path, "w") as archive:
        for run, name in ((run, name) for run in runs for name in RECORDED if run.file(name).exists()):
            text = run.file(name).read_text(encoding="utf-8")
            if name == "run.json":
                text = json.dumps({**json.loads(text), "command": []}, indent=2)
            for place, shown in hidden.items():
                text = text.replace(place, shown)
            info = zipfile.ZipInfo(f"{run.path.name}/{name}")  # No time: the same files make the same archive.
            archive.writestr(info, text, zipfile.ZIP_DEFLATED, 9)


def names(only: str | None) -> Iterator[str]:
    yield from (name for name in (*HEALTHY, *BROKEN) if only in (None, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[*HEALTHY, *BROKEN])
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    out = args.out.absolute()
    make_inputs(out)
    runs: list[RunDirectory] = []
    for name in names(args.only):
        runs.append(train(name, out))
        facts = read_facts(runs[-1].where)
        found = ", ".join(f"{finding.rule} ({finding.severity})" for finding in diagnose(facts))
        loss = facts.curve("loss").values
        print(f"{name:20} {facts.steps:4} steps  loss {loss[0]:.3f} to {loss[-1]:.3f}  {found or '-'}", flush=True)
    if args.record:
        record(runs, out, args.record)


if __name__ == "__main__":
    main()
