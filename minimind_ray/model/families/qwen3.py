"""Qwen3: queries and keys are normalised per head. MiniMind-3 has this shape."""

from __future__ import annotations

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import HEADS, ConfigFile, Family, Fields


def saves(shape: ModelShape) -> bool:
    """Whether a shape is Qwen3's."""
    return shape.qk_norm and not shape.num_experts


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have.

    Raises:
        UserError: a field is missing.
    """
    return {"qk_norm": True, **config.require(*HEADS)}


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", saves, shape_fields)
