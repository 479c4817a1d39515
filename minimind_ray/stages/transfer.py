"""Import models and adapters of other programs as directories of this project, and export .pth files for MiniMind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, save_model
from minimind_ray.model.generation import read_generation
from minimind_ray.model.lora import is_adapter
from minimind_ray.model.minimind_pth import export_lora_pth, export_pth, import_lora_pth, require_room
from minimind_ray.stages.start import whole_model
from minimind_ray.stages.use import base_of
from minimind_ray.train.run import resolve_model


def import_directory(source: str, out: Path, tokenizer: str | None) -> ModelShape:
    """Read a whole model from a directory or run, which also checks it, and write it to `out`.

    Raises:
        UserError: the source is an adapter or is damaged, or its tokenizer does not fit.
    """
    directory = resolve_model(source)
    if is_adapter(directory):
        raise UserError(f"{source} is an adapter and needs no import: use it as --adapter, or see lora merge")
    model, loaded = load_model(directory), Tokenizer.load(tokenizer or directory)
    require_room(model.shape, loaded, directory)
    save_model(model, loaded, out, generation=read_generation(directory))
    return model.shape


def import_adapter(source: Path, base: str, out: Path) -> None:
    """Write MiniMind's LoRA file as an adapter directory for `base`.

    Raises:
        UserError: the file cannot be read, or belongs to another model.
    """
    import_lora_pth(source, whole_model(base, "--base").absolute(), out)


def export(directory: Path, file: Path, base: str | None, dtype: Literal["half", "float32"]) -> dict[str, object]:
    """Write a model or an adapter as a .pth file. Return the settings that MiniMind's config needs for the model.

    Raises:
        UserError: MiniMind does not support this model, or an adapter has no base.
    """
    if is_adapter(directory):
        export_lora_pth(directory, base_of(directory, base), file, dtype)
        return {}
    return export_pth(directory, file, dtype)
