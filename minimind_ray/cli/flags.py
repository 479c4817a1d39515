"""Short flags for config keys, the same in every command that takes a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimind_ray.config.schema import Config

FLAGS = {
    "train": "data.train",
    "val": "data.val",
    "tokenizer": "data.tokenizer",
    "max_seq_len": "data.max_seq_len",
    "pack_tokens": "data.pack_tokens",
    "cache_dir": "data.cache_dir",
    "preset": "model.preset",
    "init_from": "init_from",
    "batch_tokens": "batch.tokens",
    "lr": "optim.lr",
    "schedule": "schedule.name",
    "warmup": "schedule.warmup",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "seed": "train.seed",
    "precision": "train.precision",
    "workers": "scale.workers",
    "cpus_per_worker": "scale.cpus_per_worker",
    "gpus_per_worker": "scale.gpus_per_worker",
    "rank": "lora.rank",
    "beta": "dpo.beta",
    "loss": "dpo.loss",
    "wandb": "track.wandb",
    "out": "out",
}


SOURCES = ("train", "val")
PATHS = ("tokenizer", "cache_dir", "init_from", "out")


def flag_value(flag: str, value: Any) -> Any:
    """What was given to a short flag: paths as they are, for rows one or a list; other texts as YAML has them."""
    from minimind_ray.config.load import parse_value

    if flag in SOURCES:
        texts = [value] if isinstance(value, str) else list(value)
        values = [parse_value(text) if text.startswith("[") else text for text in texts]
        # Not each text that begins so is a list: [ab]*.jsonl.
        paths = [path for v, text in zip(values, texts) for path in (v if isinstance(v, list) else [text])]
        return paths if len(paths) > 1 else paths[0]
    return parse_value(value) if isinstance(value, str) and flag not in PATHS else value


def config_from_flags(stage: str, config: list[Path], settings: list[str], flags: dict[str, Any]) -> Config:
    """The config that --config files, --set and the short flags make; later ones win in that order."""
    from minimind_ray.config.load import load_config, parse_override

    overrides = dict(parse_override(text) for text in settings)
    for flag, value in flags.items():
        if value is not None and not (flag in SOURCES and len(value) == 0):
            overrides[FLAGS[flag]] = flag_value(flag, value)
    return load_config(stage, config, overrides)
