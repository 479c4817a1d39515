"""Models as Hugging Face directories, which transformers, vLLM and llama.cpp read as they are.

    config.json               the shape: Qwen3ForCausalLM, LlamaForCausalLM, Qwen3MoeForCausalLM, or
                              GraniteMoeSharedForCausalLM, which with its multipliers at 1 is MiniMind-2's MoE
    generation_config.json    the tokenizer's control ids
    model.safetensors         float32 weights (read: shards with model.safetensors.index.json, 16-bit weights too)
    tokenizer.json, tokenizer_config.json

Nothing here runs code from a directory: JSON and safetensors only. What a directory claims is checked against the
headers of its weight files before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json, require_own
from minimind_ray.config.schema import ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.granite import (
    from_granite,
    granite_fields,
    granite_tensors,
    is_granite,
    read_granite_fields,
    to_granite,
)
from minimind_ray.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
}  # fmt: skip

# What the fields mean only with these values is what this model computes; anything else would change the result.
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "quantization_config": None, "partial_rotary_factor": 1.0,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
DTYPES = ("F32", "F16", "BF16")


class Entry(NamedTuple):
    """What an open weight file's header says of one tensor."""

    file: Any
    dtype: str
    size: tuple[int, ...]


def save_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model, and the tokenizer where there is one, as a directory that `load_model` and transformers read.

    `weights`: a copy of the model's parameters by name (float32, on the CPU) to write in their place.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    ids: dict[str, int | list[int]] = {}
    if tokenizer:
        stops = list(tokenizer.stop_ids)
        ids = {
            "bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops,
            "pad_token_id": tokenizer.pad_id,
        }  # fmt: skip
        tokenizer.save(folder)
    _write_json(folder / "config.json", {**config_of(model.shape), **ids})
    _write_json(folder / "generation_config.json", ids)
    if weights is None:
        weights = {name: p.detach().float().cpu().contiguous() for name, p in model.named_parameters()}
    if is_granite(model.shape):
        weights = to_granite(weights, model.shape)
    save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})


def config_of(shape: ModelShape) -> dict[str, Any]:
    """config.json of a shape, in the keys that every reader since transformers 4 knows."""
    kinds = ("qwen3_moe", "granitemoeshared") if shape.num_experts else ("qwen3", "llama")
    model_type = kinds[0] if shape.qk_norm else kinds[1]
    fields = shape.model_dump(exclude={"qk_norm", "dropout", "rope_scaling", "n_shared_experts"})
    experts = {k: fields.pop(k) for k in list(fields) if "expert" in k or k in MOE_FIELDS}
    if is_granite(shape):
        experts = granite_fields(shape)
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **fields,
        **(experts if shape.num_experts else {}),
        "rope_scaling": shape.rope_scaling.model_dump() if shape.rope_scaling else None,
        **({"dropout": shape.dropout} if shape.dropout else {}),
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


MOE_FIELDS = ("moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")


def load_shape(directory: str | Path) -> ModelShape:
    """The shape that config.json describes.

    Raises:
        UserError: no such file, an architecture that is not one of those above, or a field missing or impossible.
    """
    path = Path(directory) / "config.json"
    config = read_json(path, "; name a Hugging Face model directory")
    model_type = config.get("model_type")
    if model_type not in list(ARCHITECTURES):  # of a list, as it may be something that a dict cannot look up
        raise UserError(f"{path}: model_type is {model_type!r}; this reads {', '.join(ARCHITECTURES)}")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported")
    if any(kind != "full_attention" for kind in config.get("layer_types") or []):
        raise UserError(f"{path}: layer_types has other than full_attention, which is not supported")

    fields = {key: _required(config, key, path) for key in SIZES}
    if model_type in ("llama", "granitemoeshared"):
        heads = fields["num_attention_heads"]
        fields["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        fields["head_dim"] = config.get("head_dim") or _head_dim(fields, path)
    else:
        fields |= {key: _required(config, key, path) for key in ("num_key_value_heads", "head_dim")}
    if model_type == "qwen3_moe":
        count = "num_experts" if "num_experts" in config else "num_local_experts"
        fields["num_experts"] = _required(config, count, path)
        fields |= {key: _required(config, key, path) for key in ("num_experts_per_tok", *MOE_FIELDS)}
    if model_type == "granitemoeshared":
        fields |= read_granite_fields({**config, **fields}, path)
    fields["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    fields["initializer_range"] = config.get("initializer_range", 0.02)
    fields["qk_norm"] = model_type.startswith("qwen3")
    fields["dropout"] = config.get("dropout", 0.0)
    fields |= _read_rope(config, path)
    try:
        return ModelShape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{first['msg']}") from None


def _head_dim(fields: Mapping[str, Any], path: Path) -> int:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise UserError(f"{path}: hidden_size {hidden!r} does not divide by num_attention_heads {heads!r}")
    return hidden // heads


def _read_rope(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """rope_theta and rope_scaling, from transformers 5's rope_parameters or the two older keys."""
    where = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(where) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: {where} is {rope!r}, not an object")
    rope = cast("dict[str, Any]", dict(rope))
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "yarn":
        raise UserError(f"{path}: rope_type is {kind!r}; only default and yarn are supported")
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise UserError(f"{path}: yarn's factor is {factor!r}, not a number of at least 1")
    if rope.get("attention_factor") is None:
        rope["attention_factor"] = 0.1 * math.log(factor) + 1.0  # Peng et al. 2023, eq. 22
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if rope.pop("truncate", True) is not True:
        raise UserError(f"{path}: yarn with truncate false is not supported")
    return {"rope_theta": theta, "rope_scaling": rope}


def load_model(
    directory: str | Path, device: torch.device | str = "cpu", weights: Mapping[str, Tensor] | None = None
) -> Transformer:
    """The model of a directory, float32, on `device`; of its own `weights` where they are in memory already.

    Raises:
        UserError: config.json or the weights cannot be read, or do not fit each other.
    """
    shape = load_shape(directory)
    if weights is None:  # Read before the model is made: what does not fit, absurd sizes too, ends here.
        weights = _read_weights(Path(directory), shape)
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def load_weights(model: Transformer, directory: str | Path) -> None:
    """Put the weights of a directory into a model of the same shape.

    Raises:
        UserError: the weights cannot be read or do not fit the model.
    """
    model.load_state_dict(_read_weights(Path(directory), model.shape))


def check_model(directory: str | Path) -> None:
    """Check that the weights fit config.json, from their files' headers. Raises as `load_model`."""
    _fitting(Path(directory), load_shape(directory))


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """A directory's weights by name, float32. Raises as `load_model`."""
    return _read_weights(Path(directory), load_shape(directory))


def model_fingerprint(directory: str | Path) -> str:
    """SHA-256 (hex) over the shape and all tensors' names, dtypes, sizes and bytes: the same however they are sharded.

    Raises:
        UserError: config.json or the weights cannot be read.
    """
    # Without defaults, so that a field a later version adds leaves the hashes of today's models as they are.
    digest = hashlib.sha256(load_shape(directory).model_dump_json(exclude_defaults=True).encode())
    for name, entry in sorted(_read_headers(Path(directory)).items()):
        digest.update(json.dumps([name, entry.dtype, entry.size]).encode())
        digest.update(entry.file.get_tensor(name).flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def expected_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every weight of a model, without making it; MiniMind's files hold the same."""
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
        for name, size in (("q", (query, hidden)), ("k", (key, hidden)), ("v", (key, hidden)), ("o", (hidden, query))):
            yield f"{at}.self_attn.{name}_proj.weight", size
        if shape.qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        networks, width = [f"{at}.mlp"], shape.intermediate_size
        if shape.num_experts:
            yield f"{at}.mlp.gate.weight", (shape.num_experts, hidden)
            counts = {"experts": shape.num_experts, "shared_experts": shape.n_shared_experts}
            networks = (f"{at}.mlp.{kind}.{expert}" for kind, count in counts.items() for expert in range(count))
            width = shape.moe_intermediate_size or width
        for network in networks:
            yield f"{network}.gate_proj.weight", (width, hidden)
            yield f"{network}.up_proj.weight", (width, hidden)
            yield f"{network}.down_proj.weight", (hidden, width)


def stored_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and size of every weight in a model's directory."""
    if not is_granite(shape):
        yield from expected_tensors(shape)
        return
    for name, size in expected_tensors(shape.model_copy(update={"num_experts": 0})):
        if ".mlp." not in name:
            yield name, size
    yield from granite_tensors(shape)


def _read_weights(folder: Path, shape: ModelShape) -> dict[str, Tensor]:
    """All weights as float32, after their headers were found to fit the shape."""
    weights = {name: entry.file.get_tensor(name).float() for name, entry in _fitting(folder, shape).items()}
    return from_granite(weights, shape) if is_granite(shape) else weights


def _fitting(folder: Path, shape: ModelShape) -> dict[str, Entry]:
    """Every weight of a model of this shape, none missing and none too many."""
    entries = _read_headers(folder)
    if shape.tie_word_embeddings:
        entries.pop("lm_head.weight", None)  # Some directories store the tied matrix twice; transformers reads one too.
    names: set[str] = set()
    problems: list[str] = []
    # Ends with the third problem: a shape of absurd size costs no more than the headers are long.
    for name, size in stored_tensors(shape):
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif entry.size != size:
            problems.append(f"{name} is {list(entry.size)}, not {list(size)}")
        elif entry.dtype not in DTYPES:
            problems.append(f"{name} is {entry.dtype}, not {', '.join(DTYPES)}")
        names.add(name)
        if len(problems) == 3:
            break
    else:
        problems += [f"{name} is unknown" for name in sorted(entries.keys() - names)[: 3 - len(problems)]]
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")
    return entries


def _read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of the directory's weight files, read lazily.

    Raises:
        UserError: no weights, weights that need pickle, a broken file or index.
    """
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = _shards(folder)
    elif found := sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")]):
        raise UserError(
            f"{found[0]}: pickled weights can run code and are not read; save the model as safetensors "
            "(transformers: save_pretrained)"
        )
    else:
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}; name a Hugging Face model directory")
    entries: dict[str, Entry] = {}
    for path in files:
        require_own(path)
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        for name in file.keys():  # noqa: SIM118 (an open file is no mapping)
            if name in entries:
                raise UserError(f"{path}: {name} is in another shard too")
            header = file.get_slice(name)
            entries[name] = Entry(file, header.get_dtype(), tuple(header.get_shape()))
    return entries


def _shards(folder: Path) -> list[Path]:
    """The files that the index names, all of them inside the directory."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: weight_map is missing or no object")
    names = sorted({str(name) for name in cast("dict[str, Any]", weight_map).values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: {name!r} is not the name of a safetensors file in the same directory")
    return [folder / name for name in names]


def _required(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if config.get(key) is None:
        raise UserError(f"{path}: {key} is missing")
    return config[key]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
