"""The model families: the kinds of Hugging Face models that can be read and written. Each family has its own file.

    family.py              the class of families, and functions that families share
    qwen3.py               Qwen3, also for MiniMind-3
    llama.py               Llama, also for MiniMind-2
    qwen2.py               Qwen2 and Qwen2.5
    mistral.py             Mistral without its sliding window (only read; it is written as Llama)
    qwen3_moe.py           Qwen3-MoE, also for MiniMind-3 with experts
    granite_moe_shared.py  GraniteMoeShared, also for MiniMind-2 with experts

To add a family whose network `Transformer` can compute already, add a file and list it in FAMILIES.
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
    """Return the family as which models of this shape are saved."""
    (family,) = (each for each in FAMILIES.values() if each.saves(shape))
    return family


def config_of(shape: ModelShape) -> Fields:
    """Return the content of config.json for a shape, with keys that every reader since transformers 4 knows."""
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
    """Return the shape that a config.json describes.

    Raises:
        UserError: the architecture belongs to no known family, or a field is missing or impossible.
    """
    model_type = config.get("model_type")
    if model_type not in list(FAMILIES):  # A dict cannot look up a list or an object from a wrong config.json.
        raise config.error(f"model_type is {model_type!r}; known are {', '.join(FAMILIES)}")
    fields = common_fields(config)
    fields |= FAMILIES[model_type].shape_fields(config, fields)
    try:
        return ModelShape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise config.error(f"{f'{key}: ' if key else ''}{first['msg']}") from None
