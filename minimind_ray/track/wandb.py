"""Weights & Biases: one run per training run, the same run after a resume, no step twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimind_ray.config.schema import Config


class WandbTracker:
    """Logs metrics against tokens and steps. Made by `open_tracker`, on rank 0 only."""

    def __init__(self, config: Config, mode: str, info: Mapping[str, Any], resumed_at: int) -> None:
        import wandb

        track = config.track
        self.logged = resumed_at
        self.run = wandb.init(
            # The id follows from where the run lies, so a resumed run goes on in the same W&B run.
            id=hashlib.blake2b(f"{info.get('created')}/{config.out}".encode(), digest_size=8).hexdigest(),
            resume="allow",
            mode="online" if mode == "online" else "offline",
            project=track.project,
            entity=track.entity,
            group=track.group,
            name=track.name or Path(config.out).name,
            job_type=config.stage,
            tags=track.tags,
            config=flatten(config.model_dump(mode="json")),
            dir=config.out,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )
        self.run.define_metric("step")
        self.run.define_metric("tokens")
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self.run.log(flatten(metrics), step=metrics["step"])

    def finish(self, state: str) -> None:
        """Close the run; `state` is how it ended."""
        self.run.summary["state"] = state
        self.run.finish()


def open_tracker(config: Config, info: Mapping[str, Any], *, resumed_at: int) -> WandbTracker | None:
    """The tracker that `track.wandb` asks for, None when it is off; `info` is the run's run.json."""
    mode = config.track.wandb
    if mode == "auto":
        mode = "online" if has_key() else "offline"
    return None if mode == "off" else WandbTracker(config, mode, info, resumed_at)


def has_key() -> bool:
    """Whether W&B has a key on this machine."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())


def flatten(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys, which W&B's parallel coordinates can show."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{at}{key}.") if isinstance(value, Mapping) else {f"{at}{key}": value}
    return flat
