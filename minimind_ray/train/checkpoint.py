"""Write and read a checkpoint's folder resume/: all that a resumed run needs besides the weights.

    resume/optimizer.safetensors   the optimizer's state, <state>.<parameter name>, float32
    resume/state.json              the run's `Progress`: step, tokens, best checkpoint, packs trained on
    resume/sums.json               SHA-256 of every file of the checkpoint (written by run.py)

No random state is saved: every step seeds the generators from (seed, step, rank).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json, require_own
from minimind_ray.train.optim import AdamW


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Return the optimizer's current state, not copied, by the names in optimizer.safetensors."""
    return {
        f"{key}.{name}": value
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key, value in optimizer.state[p].items()
    }


def save_resume(directory: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write the optimizer's `tensors` and the run's `state` into resume/ of a checkpoint `directory`.

    Training may continue meanwhile, so `tensors` should be a copy of `optimizer_tensors`.
    """
    save_file(dict(tensors), directory / "resume" / "optimizer.safetensors")
    (directory / "resume" / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def load_resume(directory: Path, model: nn.Module, optimizer: AdamW) -> dict[str, Any]:
    """Restore the optimizer's state, and return the content of state.json.

    Raises:
        UserError: the files cannot be read, or do not belong to this model.
    """
    tensors = _read_tensors(directory / "resume" / "optimizer.safetensors")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        found: dict[str, Tensor] = {k: tensors.pop(f"{k}.{name}", torch.empty(0)) for k in STATE}
        sizes = {k: torch.Size() if k == "step" else p.shape for k in STATE}
        if any(found[k].shape != size or found[k].dtype != torch.float32 for k, size in sizes.items()):
            raise UserError(f"{directory}/resume/optimizer.safetensors does not fit the model: {name}")
        # Fused AdamW keeps its step count on the parameter's device.
        optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
    if tensors:
        raise UserError(f"{directory}/resume/optimizer.safetensors has a state for {next(iter(tensors))}, unknown here")
    return read_state(directory)


def read_state(directory: Path) -> dict[str, Any]:
    """Return the content of state.json, with at least `step`, `tokens`, `best` and `best_value`.

    Raises:
        UserError: state.json cannot be read, or one of these keys is missing or has a wrong type.
    """
    path = directory / "resume" / "state.json"
    state = read_json(path)
    best, value = state.get("best"), state.get("best_value")
    whole = all(type(state.get(key)) is int and state[key] >= 0 for key in ("step", "tokens"))
    named = best is None or (isinstance(best, str) and re.fullmatch(r"step-\d{8}", best))
    if not (whole and named and isinstance(value, float)):
        raise UserError(f"{path}: no run has written this file: expected step, tokens, best and best_value")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    require_own(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


STATE = ("step", "exp_avg", "exp_avg_sq")  # The state of torch's AdamW for each parameter.
