"""The class of model families. A family says how to read and write models of one Hugging Face architecture.

It translates between a `ModelShape` with the parameter names of `Transformer`, and a config.json with the
architecture's tensor names. Most families differ only in a few fields of config.json, and have the same tensor names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json
from minimind_ray.config.schema import ModelShape

Fields = dict[str, Any]
Sizes = Iterator[tuple[str, tuple[int, ...]]]

REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
"""Fields that every family's config.json must have."""
HEADS = ("num_key_value_heads", "head_dim")
"""Fields that config.json may leave out in some families, which then derive them."""
DEFAULTS: Fields = {"tie_word_embeddings": False, "initializer_range": 0.02, "dropout": 0.0}
"""Fields that may be left out, with Hugging Face's defaults."""
FIXED: Fields = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "quantization_config": None, "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
"""Fields that are supported with only one value, because `Transformer` computes no other."""


class ConfigFile:
    """The content of a config.json, and its path for error messages.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = read_json(path, "; name a Hugging Face model directory")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a field, or `default` if the field is missing."""
        return self.content.get(key, default)

    def require(self, *keys: str) -> Fields:
        """Return the fields of these names.

        Raises:
            UserError: a field is missing or null.
        """
        for key in keys:
            if self.get(key) is None:
                raise self.error(f"{key} is missing")
        return {key: self.content[key] for key in keys}

    def error(self, problem: str) -> UserError:
        """Return an error about this file, to raise."""
        return UserError(f"{self.path}: {problem}")


def expected_tensors(shape: ModelShape) -> Sizes:
    """Yield name and size of every parameter of `Transformer(shape)`; MiniMind's files have the same tensors."""
    hidden, head = shape.hidden_size, shape.head_dim
    query, key = shape.num_attention_heads * head, shape.num_key_value_heads * head
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not shape.tie_word_embeddings:
        yield "lm_head.weight", (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        for name, size in (("q", query), ("k", key), ("v", key)):
            yield f"{at}.self_attn.{name}_proj.weight", (size, hidden)
            if shape.qkv_bias:
                yield f"{at}.self_attn.{name}_proj.bias", (size,)
        yield f"{at}.self_attn.o_proj.weight", (hidden, query)
        if shape.qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        yield from _feed_forward(shape, f"{at}.mlp")


def _feed_forward(shape: ModelShape, at: str) -> Sizes:
    hidden, networks, width = shape.hidden_size, [at], shape.intermediate_size
    if shape.num_experts:
        yield f"{at}.gate.weight", (shape.num_experts, hidden)
        counts = {"experts": shape.num_experts, "shared_experts": shape.n_shared_experts}
        networks = (f"{at}.{kind}.{expert}" for kind, count in counts.items() for expert in range(count))
        width = shape.moe_intermediate_size or width
    for network in networks:
        yield f"{network}.gate_proj.weight", (width, hidden)
        yield f"{network}.up_proj.weight", (width, hidden)
        yield f"{network}.down_proj.weight", (hidden, width)


def _as_they_are(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    return dict(weights)


def _no_fields(shape: ModelShape) -> Fields:
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture.

    `saves` says whether a shape is written as this family; every shape is written as exactly one. `shape_fields` takes
    config.json and the fields that `common_fields` read, and returns the fields of the shape that they lack or change;
    `config_fields` does the opposite.
    """

    model_type: str
    architecture: str
    saves: Callable[[ModelShape], bool]
    shape_fields: Callable[[ConfigFile, Fields], Fields]
    config_fields: Callable[[ModelShape], Fields] = _no_fields
    tensors: Callable[[ModelShape], Sizes] = expected_tensors
    """Name and size of every tensor in a directory."""
    to_stored: Callable[[Mapping[str, Tensor], ModelShape], dict[str, Tensor]] = _as_they_are
    """Converts `Transformer`'s weights to the architecture's names."""
    from_stored: Callable[[Mapping[str, Tensor], ModelShape], dict[str, Tensor]] = _as_they_are
    """Converts the architecture's weights to `Transformer`'s names."""


def common_fields(config: ConfigFile) -> Fields:
    """Return the fields of a shape that all families write in the same way.

    Raises:
        UserError: a field is missing, or has a value that `Transformer` does not compute.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise config.error(f"{key} is {config.get(key)!r}; only {value!r} is supported")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise config.error("layer_types has other types than full_attention, which are not supported")
    fields = config.require(*REQUIRED)
    fields |= {key: config.get(key, default) for key, default in DEFAULTS.items()}
    return fields | _rope_fields(config)


def head_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of `HEADS`.

    If config.json leaves them out, there is one key head per query head, and head_dim is hidden_size divided by heads.

    Raises:
        UserError: hidden_size is not divisible by the number of heads.
    """
    heads = fields["num_attention_heads"]
    return {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or _head_dim(config, fields["hidden_size"], heads),
    }


def _head_dim(config: ConfigFile, hidden: object, heads: object) -> int:
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise config.error(f"hidden_size {hidden!r} does not divide by num_attention_heads {heads!r}")
    return hidden // heads


def _rope_fields(config: ConfigFile) -> Fields:
    """Return rope_theta and rope_scaling, from transformers 5's rope_parameters or from the two older keys."""
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(where) or {}
    if not isinstance(rope, dict):
        raise config.error(f"{where} is {rope!r}, not an object")
    rope = cast("Fields", dict(rope))
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "yarn":
        raise config.error(f"rope_type is {kind!r}; only default and yarn are supported")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise config.error(f"yarn's factor is {factor!r}, not a number of at least 1")
    if rope.get("attention_factor") is None:
        rope["attention_factor"] = 0.1 * math.log(factor) + 1.0  # Peng et al. 2023, eq. 22
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if rope.pop("truncate", True) is not True:
        raise config.error("yarn with truncate false is not supported")
    return {"rope_theta": theta, "rope_scaling": rope}
