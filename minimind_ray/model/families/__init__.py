"""The model families: which Hugging Face models can be read and written, one file each.

    family.py              what a family is, and what the families have in common
    qwen3.py               Qwen3, which MiniMind-3 is
    llama.py               Llama, which MiniMind-2 is
    qwen2.py               Qwen2 and Qwen2.5
    mistral.py             Mistral without its sliding window (read only: it is written as Llama)
    qwen3_moe.py           Qwen3-MoE, which MiniMind-3's MoE is
    granite_moe_shared.py  GraniteMoeShared, which MiniMind-2's MoE is

To add a family whose network `Transformer` computes already, add a file and its line in FAMILIES.
"""

from __future__ import annotations

from pydantic import ValidationError

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import DEFAULTS, HEADS, REQUIRED, ConfigFile, Family, Fields, common_fields
from minimind_ray.model.families.granite_moe_shared import GRANITE_MOE_SHARED
from minimind_ray.model.families.llama import LLAMA
from minimind_ray.model.families.mistral import MISTRAL
from minimind_ray.model.families.qwen2 import QWEN2
from minimind_ray.model.families.qwen3 import QWEN3
from minimind_ray.model.families.qwen3_moe import QWEN3_MOE

FAMILIES = {
    family.model_type: family for family in (QWEN3, LLAMA, QWEN2, MISTRAL, QWEN3_MOE, GRANITE_MOE_SHARED)
}  # fmt: skip


def family_of(shape: ModelShape) -> Family:
    """The family that models of this shape are saved as."""
    (family,) = (each for each in FAMILIES.values() if each.saves(shape))
    return family


def config_of(shape: ModelShape) -> Fields:
    """config.json of a shape, in the keys that every reader since transformers 4 knows."""
    family = family_of(shape)
    common = {*REQUIRED, *HEADS, *DEFAULTS, "rope_theta"} - {"dropout"}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **shape.model_dump(include=common),
        **family.config_fields(shape),
        "rope_scaling": shape.rope_scaling.model_dump() if shape.rope_scaling else None,
        **({"dropout": shape.dropout} if shape.dropout else {}),
        "hidden_act": "silu",
        **({} if shape.qkv_bias else {"attention_bias": False}),  # Qwen2's config has no such field.
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def read_shape(config: ConfigFile) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        UserError: an architecture of no known family, or a field missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in list(FAMILIES):  # A list can be searched for values that a dict cannot look up.
        raise config.error(f"model_type is {model_type!r}; known are {', '.join(FAMILIES)}")
    fields = common_fields(config)
    fields |= FAMILIES[model_type].shape_fields(config, fields)
    try:
        return ModelShape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise config.error(f"{f'{key}: ' if key else ''}{first['msg']}") from None
