"""GraniteMoeShared: Llama with a mixture of experts, some of them shared by all tokens. MiniMind-2's MoE is one.

In both, shared experts have weight 1, and the weights of the chosen experts are a softmax over their scores. (MiniMind
takes the softmax over all experts and normalises over the chosen experts, with the same result.) Granite's multipliers
are written with values that change nothing. Granite's tensors have another layout: the experts of a layer are one
tensor, with gate above up, and the shared experts of a layer are one network.

    E experts   C channels   F feed-forward size of one expert
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.families.family import ConfigFile, Family, Fields, Sizes, expected_tensors
from minimind_ray.model.families.llama import shape_fields as llama_fields

NEUTRAL = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
EXPERTS = ("num_experts_per_tok", "router_aux_loss_coef")
HEAD_SIZES = range(2, 2**16, 2)
KINDS = ("gate", "up", "down")


def saves(shape: ModelShape) -> bool:
    """Whether a shape is GraniteMoeShared's."""
    return shape.num_experts > 0 and not shape.qk_norm


def shape_fields(config: ConfigFile, fields: Fields) -> Fields:
    """Return the fields of the shape that only some families have.

    If the shared network is n times as wide as an expert, the shape has n shared experts.

    Raises:
        UserError: a field is missing, or has a value that `Transformer` does not compute.
    """
    attention = llama_fields(config, fields)
    experts = config.require("num_local_experts", *EXPERTS, "attention_multiplier", *NEUTRAL)
    for key, value in NEUTRAL.items():
        if experts[key] != value:
            raise config.error(f"{key} is {experts[key]!r}; only {value!r} is supported")
    multiplier, head_dim = experts["attention_multiplier"], attention["head_dim"]
    if not (isinstance(multiplier, float) and head_dim in HEAD_SIZES and math.isclose(multiplier, head_dim**-0.5)):
        raise config.error(f"attention_multiplier is {multiplier!r}; only 1 / sqrt(head_dim) is supported")
    shared, width = config.get("shared_intermediate_size", 0), fields["intermediate_size"]
    if not (isinstance(shared, int) and isinstance(width, int) and width > 0 and shared % width == 0):
        raise config.error(f"shared_intermediate_size {shared!r} is not a multiple of intermediate_size {width!r}")
    return {
        **attention,
        **{key: experts[key] for key in EXPERTS},
        "num_experts": experts["num_local_experts"],
        "n_shared_experts": shared // width,
        "moe_intermediate_size": width,
    }


def config_fields(shape: ModelShape) -> Fields:
    """Return the fields of config.json about the experts, and the multipliers."""
    width = _width(shape)
    return {
        "intermediate_size": width,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "shared_intermediate_size": shape.n_shared_experts * width,
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "attention_multiplier": shape.head_dim**-0.5,
        **NEUTRAL,
    }


def tensors(shape: ModelShape) -> Sizes:
    """Yield name and size of every tensor in a directory."""
    for name, size in expected_tensors(shape.model_copy(update={"num_experts": 0})):
        if ".mlp." not in name:
            yield name, size
    yield from _expert_tensors(shape)


def _expert_tensors(shape: ModelShape) -> Sizes:
    """Yield name and size of the experts' tensors in a directory."""
    hidden, width = shape.hidden_size, _width(shape)
    for layer in range(shape.num_hidden_layers):
        experts, shared = _names(layer)
        yield f"{experts}.router.layer.weight", (shape.num_experts, hidden)
        yield f"{experts}.input_linear.weight", (shape.num_experts, 2 * width, hidden)
        yield f"{experts}.output_linear.weight", (shape.num_experts, hidden, width)
        if all_shared := shape.n_shared_experts * width:
            yield f"{shared}.input_linear.weight", (2 * all_shared, hidden)
            yield f"{shared}.output_linear.weight", (hidden, all_shared)


def to_stored(weights: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Return `Transformer`'s weights under Granite's names."""
    stored = {name: tensor for name, tensor in weights.items() if ".mlp." not in name}
    for layer in range(shape.num_hidden_layers):
        mlp, (experts, shared) = f"model.layers.{layer}.mlp", _names(layer)
        gate_EFC, up_EFC, down_ECF = _stacked(weights, f"{mlp}.experts", shape.num_experts)
        stored[f"{experts}.router.layer.weight"] = weights[f"{mlp}.gate.weight"]
        stored[f"{experts}.input_linear.weight"] = torch.cat([gate_EFC, up_EFC], 1)
        stored[f"{experts}.output_linear.weight"] = down_ECF
        if shape.n_shared_experts:
            gate_EFC, up_EFC, down_ECF = _stacked(weights, f"{mlp}.shared_experts", shape.n_shared_experts)
            stored[f"{shared}.input_linear.weight"] = torch.cat([gate_EFC, up_EFC]).flatten(0, 1)
            stored[f"{shared}.output_linear.weight"] = down_ECF.transpose(0, 1).flatten(1).contiguous()
    return stored


def _stacked(weights: Mapping[str, Tensor], at: str, count: int) -> list[Tensor]:
    return [torch.stack([weights[f"{at}.{i}.{kind}_proj.weight"] for i in range(count)]) for kind in KINDS]


def from_stored(stored: Mapping[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Return Granite's weights under `Transformer`'s names. Each weight has its own memory."""
    own = {name for name, _ in _expert_tensors(shape)}
    weights = {name: tensor for name, tensor in stored.items() if name not in own}
    for layer in range(shape.num_hidden_layers):
        mlp, (experts, shared) = f"model.layers.{layer}.mlp", _names(layer)
        weights[f"{mlp}.gate.weight"] = stored[f"{experts}.router.layer.weight"]
        gate_EFC, up_EFC = stored[f"{experts}.input_linear.weight"].chunk(2, 1)
        parts = {"experts": (gate_EFC, up_EFC, stored[f"{experts}.output_linear.weight"])}
        if count := shape.n_shared_experts:
            gate_EFC, up_EFC = stored[f"{shared}.input_linear.weight"].unflatten(0, (2, count, -1))
            down_CEF = stored[f"{shared}.output_linear.weight"].unflatten(1, (count, -1))
            parts["shared_experts"] = (gate_EFC, up_EFC, down_CEF.transpose(0, 1))
        for kind, projections in parts.items():
            for name, stacked in zip(KINDS, projections):
                for expert, weight in enumerate(stacked):
                    copy = weight.clone(memory_format=torch.contiguous_format)
                    weights[f"{mlp}.{kind}.{expert}.{name}_proj.weight"] = copy
    return weights


def _names(layer: int) -> tuple[str, str]:
    return f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.shared_mlp"


def _width(shape: ModelShape) -> int:
    return shape.moe_intermediate_size or shape.intermediate_size


GRANITE_MOE_SHARED = Family(
    "granitemoeshared", "GraniteMoeSharedForCausalLM", saves, shape_fields, config_fields, tensors, to_stored,
    from_stored,
)  # fmt: skip
