"""Qwen2 and Qwen2.5: Llama, with a bias on the projections to queries, keys and values."""

from __future__ import annotations

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import ConfigFile, Family, Fields, head_fields


def saves(shape: ModelShape) -> bool:
    """Whether a shape is Qwen2's."""
    return shape.qkv_bias


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have."""
    return {"qk_norm": False, "qkv_bias": True, **head_fields(config, fields)}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", saves, shape_fields)
