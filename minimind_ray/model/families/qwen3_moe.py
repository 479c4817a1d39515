"""Qwen3 with a mixture of experts in every layer. MiniMind-3's MoE has this shape."""

from __future__ import annotations

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import ConfigFile, Family, Fields
from minimind_ray.model.families.qwen3 import shape_fields as qwen3_fields

EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")


def saves(shape: ModelShape) -> bool:
    """Whether a shape is Qwen3-MoE's."""
    return shape.qk_norm and shape.num_experts > 0


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have.

    Raises:
        UserError: a field is missing.
    """
    attention = qwen3_fields(config, fields)
    count = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return {**attention, "num_experts": config.require(count)[count], **config.require(*EXPERTS)}


def config_fields(shape: ModelShape) -> Fields:
    """Return the fields of config.json about the experts."""
    return shape.model_dump(include={"num_experts", *EXPERTS})


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", saves, shape_fields, config_fields)
