"""What a resume needs beside the weights: optimizer state and the step, in resume/ of a checkpoint.

    resume/optimizer.safetensors   <state>.<parameter name>, float32
    resume/state.json              the step and what the loop remembers
    resume/sums.json               SHA-256 of every file

Random state is not kept because there is none to keep: every step seeds the generators from (seed, step, rank).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minimind_ray.config.errors import UserError


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as it stands, by the names in optimizer.safetensors."""
    return {
        f"{key}.{name}": value
        for name, p in model.named_parameters()
        if p in optimizer.state
        for key, value in optimizer.state[p].items()
    }


def save_resume(directory: Path, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    """Write resume/ in a checkpoint `directory` (see the module's text); `tensors`: a copy of `optimizer_tensors`."""
    save_file(dict(tensors), directory / "resume" / "optimizer.safetensors")
    (directory / "resume" / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def load_resume(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the optimizer's state back and return the loop's.

    Raises:
        UserError: the files do not belong to this model.
    """
    tensors = load_file(directory / "resume" / "optimizer.safetensors")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        found: dict[str, Tensor] = {k: tensors.pop(f"{k}.{name}", torch.empty(0)) for k in STATE}
        if any(found[k].shape != p.shape for k in STATE if k != "step"):
            raise UserError(f"{directory}/resume/optimizer.safetensors does not fit the model: {name}")
        # Fused AdamW keeps its step count on the parameter's device.
        optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}
    if tensors:
        raise UserError(f"{directory}/resume/optimizer.safetensors has a state for {next(iter(tensors))}, unknown here")
    return json.loads((directory / "resume" / "state.json").read_text(encoding="utf-8"))


STATE = ("step", "exp_avg", "exp_avg_sq")  # What torch's AdamW keeps per parameter.
