"""Llama: attention without a norm of queries and keys, one feed-forward network per layer. MiniMind-2 is a Llama."""

from __future__ import annotations

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import ConfigFile, Family, Fields, head_fields


def saves(shape: ModelShape) -> bool:
    """Whether a shape is Llama's."""
    return not (shape.qk_norm or shape.qkv_bias or shape.num_experts)


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have."""
    return {"qk_norm": False, **head_fields(config, fields)}


LLAMA = Family("llama", "LlamaForCausalLM", saves, shape_fields)
