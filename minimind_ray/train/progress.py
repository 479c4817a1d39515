"""The progress of a run between two steps. It is written with every checkpoint and read by a resume."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minimind_ray.config.errors import UserError
from minimind_ray.train.ledger import Ledger


@dataclass
class Progress:
    """Steps and tokens so far, the best checkpoint with its loss, and the packs trained on (see ledger.py)."""

    step: int = 0
    tokens: int = 0
    best: str | None = None
    best_value: float = math.inf
    ledger: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any], checkpoint: Path) -> Progress:
        """Return the progress of the run when it wrote `checkpoint`. `state` is the content of its state.json.

        Raises:
            UserError: another version of minimind-ray wrote state.json, or it is damaged.
        """
        try:
            progress = cls(**state)
            if progress.ledger:
                Ledger(**progress.ledger)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{checkpoint}/resume/state.json: another version of minimind-ray wrote it, or it is damaged: {error}"
            ) from None
        return progress

    @property
    def checkpoint(self) -> str:
        """Return the name of the checkpoint written after this step."""
        return f"step-{self.step:08d}"
