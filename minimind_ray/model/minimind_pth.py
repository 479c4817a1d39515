"""Convert MiniMind's .pth files to Hugging Face or PEFT directories and back.

MiniMind-2 (Llama's shape; with experts, GraniteMoeShared's) and MiniMind-3 (Qwen3's shape) are supported: dense models,
models with experts, and LoRA files.

A .pth file is a dict of tensors by name, written by torch.save, usually in half precision. The sizes come from the
tensors. The rest of MiniMind's config is not in the file, see `settings_not_in_file`. Files are memory-mapped, and
only tensors are unpickled, so no code of a file runs.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import MINIMIND_2, MINIMIND_2_MOE, MINIMIND_3, LoraConfig, ModelShape, RopeScaling
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, model_fingerprint, save_model
from minimind_ray.model.families.family import expected_tensors
from minimind_ray.model.families.granite_moe_shared import saves as is_granite
from minimind_ray.model.lora import adapters, add_lora, load_adapter, save_adapter, saved_modules, target_names
from minimind_ray.model.transformer import Transformer

DTYPES = {"half": torch.float16, "float32": torch.float32}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LORA_KEY = re.compile(r"(.+)\.lora\.([AB])\.weight")


def settings_not_in_file(qk_norm: bool, experts: bool) -> dict[str, Any]:
    """Return the settings that are not in a .pth file of this kind, with MiniMind's defaults, by MiniMind-3's names.

    Some settings are not needed: sizes, which the tensors show; flash_attn, which does not change results; token ids,
    which come from the tokenizer; and hidden_act, scoring_func and seq_aux, which `Transformer` supports only with
    their default values.
    """
    family = MINIMIND_3 if qk_norm else MINIMIND_2
    settings = {
        "rope_theta": 1e6, "inference_rope_scaling": False, "max_position_embeddings": 32768,
        "rms_norm_eps": family["rms_norm_eps"], "dropout": 0.0,
    }  # fmt: skip
    if not qk_norm:
        settings["num_attention_heads"] = family["num_attention_heads"]
    if experts:
        settings |= {"num_experts_per_tok": 1, "norm_topk_prob": True, "router_aux_loss_coef": 5e-4}
    return settings | (MINIMIND_2_MOE if experts and not qk_norm else {})


def import_pth(
    path: str | Path, tokenizer_dir: str | Path, out_dir: str | Path, settings: Mapping[str, Any] | None = None
) -> ModelShape:
    """Write a MiniMind model file as a Hugging Face model directory, and return its shape.

    `settings` replace defaults of `settings_not_in_file`.

    Raises:
        UserError: the file cannot be read, has values other than tensors, or is not a MiniMind model; a setting is
            impossible or does not apply to this model; or the tokenizer has more tokens than the model.
    """
    path = Path(path)
    tokenizer = Tokenizer.load(tokenizer_dir)
    tensors = read_pth(path)
    shape = _shape_of(tensors, path, settings or {})
    require_room(shape, tokenizer, path)
    if shape.tie_word_embeddings:
        tensors.pop(HEAD, None)
    with torch.device("meta"):
        model = Transformer(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    save_model(model, tokenizer, out_dir)
    return shape


def require_room(shape: ModelShape, tokenizer: Tokenizer, path: str | Path) -> None:
    """Raise UserError if the tokenizer has more tokens than the model from `path`."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{path}: the model has {shape.vocab_size} tokens, fewer than the {tokenizer.vocab_size} of "
            f"{tokenizer.name}; name the tokenizer it was trained with"
        )


def export_pth(
    directory: str | Path, path: str | Path, dtype: Literal["half", "float32"] = "half"
) -> dict[str, object]:
    """Write a model directory as a .pth file that MiniMind loads. Return the model's `minimind_settings`.

    The file has tied embeddings under both of their names.

    Raises:
        UserError: the directory cannot be read, a weight is too large for half precision, or MiniMind does not support
            such a model.
    """
    model = load_model(directory)
    if model.shape.qkv_bias:
        raise UserError(f"{directory}: MiniMind's attention has no biases, so MiniMind cannot load this model")
    if is_granite(model.shape):
        _require_normalised(directory, model.shape.num_experts_per_tok, model.shape.norm_topk_prob)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    tensors.setdefault(HEAD, tensors[EMBEDDING])
    _write(tensors, Path(path), dtype)
    return minimind_settings(model.shape)


def minimind_settings(shape: ModelShape) -> dict[str, object]:
    """Return the arguments of MiniMindConfig that this model needs and that differ from MiniMind's defaults.

    MiniMind reads no settings from the file. Its scripts have options only for hidden_size, num_hidden_layers, use_moe
    and inference_rope_scaling. MiniMind-2 always ties embeddings; to load untied embeddings, change its code.
    """
    scaled, experts = shape.rope_scaling is not None, shape.num_experts
    ours: dict[str, object] = {
        **shape.model_dump(), "inference_rope_scaling": scaled,
        "n_routed_experts": experts, "aux_loss_alpha": shape.router_aux_loss_coef,
    }  # fmt: skip
    family = MINIMIND_3 if shape.qk_norm else MINIMIND_2
    theirs: dict[str, object] = {
        "vocab_size": 6400, "head_dim": shape.hidden_size // shape.num_attention_heads, "tie_word_embeddings": True,
        "rope_scaling": RopeScaling().model_dump() if scaled else None,
        "num_attention_heads": family["num_attention_heads"], "num_key_value_heads": family["num_key_value_heads"],
        **settings_not_in_file(shape.qk_norm, experts > 0),
    }  # fmt: skip
    if shape.qk_norm:
        width = "moe_intermediate_size" if experts else "intermediate_size"
        theirs[width] = math.ceil(shape.hidden_size * math.pi / 64) * 64
        if experts:
            theirs["num_experts"] = 4
    else:
        theirs["intermediate_size"] = math.ceil(int(shape.hidden_size * 8 / 3) / 64) * 64
        if experts:
            theirs |= {"n_routed_experts": 4, "n_shared_experts": 1}
            theirs["aux_loss_alpha"] = theirs.pop("router_aux_loss_coef")
            ours["intermediate_size"] = shape.moe_intermediate_size
    return {key: ours[key] for key, value in theirs.items() if ours[key] != value}


def import_lora_pth(path: str | Path, base_dir: str | Path, out_dir: str | Path) -> None:
    """Write a MiniMind LoRA file as a PEFT adapter of the model in `base_dir`. Its alpha is its rank: the scale is 1.

    Raises:
        UserError: the file or the base cannot be read, or do not fit each other.
    """
    path, model = Path(path), load_model(base_dir)
    tensors = read_pth(path)
    parts = [LORA_KEY.fullmatch(key) for key in tensors]
    if not parts or None in parts:
        raise UserError(f"{path}: not a MiniMind LoRA file: has {_some(tensors)}; expected names like …lora.A.weight")
    adapted = {part[1] for part in parts if part}
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    known = {name: model.get_submodule(name) for name in target_names(model, "all-linear")}
    if foreign := sorted(adapted - known.keys()):
        raise UserError(f"{path}: {foreign[0]} is not a projection of the model in {base_dir}; name its own base")
    names = target_names(model, leaves)
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    rank = max(1, min(next(iter(sizes.values())), default=1))
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        rows, columns = cast(torch.nn.Linear, known[name]).weight.shape
        expected |= {f"{name}.lora.A.weight": (rank, columns), f"{name}.lora.B.weight": (rows, rank)}
    _require_fit(path, sizes, expected)
    add_lora(model, LoraConfig.model_validate({"rank": rank, "targets": leaves}), seed=0)
    for name, layer in adapters(model).items():
        layer.lora_A.data.copy_(tensors[f"{name}.lora.A.weight"])
        layer.lora_B.data.copy_(tensors[f"{name}.lora.B.weight"])
    save_adapter(model, out_dir, base_dir, model_fingerprint(base_dir))


def export_lora_pth(
    adapter_dir: str | Path, base_dir: str | Path, path: str | Path, dtype: Literal["half", "float32"] = "half"
) -> None:
    """Write a PEFT adapter of the model in `base_dir` as a MiniMind LoRA file; B is multiplied by the adapter's scale.

    Raises:
        UserError: adapter or model cannot be read, or they do not belong together, or MiniMind does not support such
            adapters: it adapts all square projections and no others, and has no DoRA.
    """
    model = load_model(base_dir)
    square = target_names(model, "square")
    if modules := saved_modules(adapter_dir):
        raise UserError(
            f"{adapter_dir}: MiniMind's LoRA files have no place for modules_to_save ({', '.join(modules)}); merge the "
            "adapter into its base and export that"
        )
    load_adapter(model, adapter_dir, model_fingerprint(base_dir))
    tensors: dict[str, Tensor] = {}
    for name, layer in adapters(model).items():
        if layer.magnitude is not None:
            raise UserError(f"{adapter_dir}: MiniMind has no DoRA; merge the adapter into its base and export that")
        tensors |= {f"{name}.lora.A.weight": layer.lora_A, f"{name}.lora.B.weight": layer.lora_B * layer.scale}
    if list(adapters(model)) != square:
        raise UserError(
            f"{adapter_dir}: MiniMind adapts every layer's {', '.join(sorted({n.rpartition('.')[2] for n in square}))} "
            "and nothing else; merge the adapter into its base and export that"
        )
    _write({name: tensor.detach() for name, tensor in tensors.items()}, Path(path), dtype)


def read_pth(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .pth file by name, memory-mapped.

    Raises:
        UserError: the file cannot be read, or has a value that is not a dense tensor of floating-point numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        # Refuse compressed archives: a small file could unpack to a huge size.
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise UserError(f"{path}: a packed archive, not a file that torch.save wrote")
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors; such pickles can run code and are not read") from None
    except Exception as error:  # A damaged file can make the unpickler raise anything.
        raise UserError(f"{path}: not a file that torch.save wrote ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    content = cast("dict[Any, Any]", content)
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            resume = isinstance(content.get("optimizer"), dict)
            hint = "; this is a resume file: name the weights file in the same folder" if resume else ""
            raise UserError(f"{path}: entry {name!r:.60} is not a tensor but a {type(value).__name__}{hint}")
        dense = value.layout is torch.strided and value.device.type == "cpu" and value.is_contiguous()
        if not (dense and value.is_floating_point()):
            raise UserError(f"{path}: {name} is not a dense tensor of floating-point numbers")
    return cast("dict[str, Tensor]", content)


def _shape_of(tensors: Mapping[str, Tensor], path: Path, given: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model from its tensors and the given settings.

    Raises UserError if the file is not a MiniMind model, or a tensor does not fit the shape.
    """
    if any(LORA_KEY.fullmatch(key) for key in tensors):
        raise UserError(f"{path}: a LoRA file, not a model; import it as an adapter, with its base")

    size = partial(_size, tensors, path)
    vocab_size, hidden_size = size(EMBEDDING)
    attention = "model.layers.0.self_attn"
    query, key = size(f"{attention}.q_proj.weight")[0], size(f"{attention}.k_proj.weight")[0]
    qk_norm = f"{attention}.q_norm.weight" in tensors
    experts, shared = (
        {int(m[1]) for name in tensors if (m := re.match(rf"model\.layers\.0\.mlp\.{kind}\.(\d{{1,4}})\.", name))}
        for kind in ("experts", "shared_experts")
    )
    layers = [int(m[1]) for name in tensors if (m := re.match(r"model\.layers\.(\d{1,4})\.", name))]
    network = "model.layers.0.mlp.experts.0" if experts else "model.layers.0.mlp"
    width = size(f"{network}.gate_proj.weight")[0]
    settings = settings_not_in_file(qk_norm, bool(experts))
    if unused := sorted(given.keys() - settings - {"num_attention_heads"}):
        raise UserError(f"{path}: the model has no experts; leave {unused[0]} out")
    settings |= given
    if qk_norm:
        head_dim = size(f"{attention}.q_norm.weight", 1)[0]
    else:
        head_dim = max(1, query // settings["num_attention_heads"])
    heads = query // head_dim
    if settings.pop("num_attention_heads", heads) != heads:
        raise UserError(f"{path}: the model has {heads} heads of {head_dim}; leave num_attention_heads out")
    if experts and not qk_norm:
        _require_normalised(path, settings["num_experts_per_tok"], settings["norm_topk_prob"])
    yarn = RopeScaling() if settings.pop("inference_rope_scaling") else None
    if yarn and settings["max_position_embeddings"] <= yarn.original_max_position_embeddings:
        yarn = None  # MiniMind does the same.
    shape = _valid_shape(
        path,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=heads,
        num_key_value_heads=key // head_dim,
        head_dim=head_dim,
        intermediate_size=width,
        rope_scaling=yarn,
        tie_word_embeddings=HEAD not in tensors or torch.equal(tensors[HEAD].float(), tensors[EMBEDDING].float()),
        qk_norm=qk_norm,
        num_experts=len(experts),
        n_shared_experts=len(shared) if experts and not qk_norm else 0,
        moe_intermediate_size=width if experts else None,
        **settings,
    )
    sizes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shape.tie_word_embeddings:
        sizes.pop(HEAD, None)
    _require_fit(path, sizes, dict(expected_tensors(shape)))
    return shape


def _size(tensors: Mapping[str, Tensor], path: Path, name: str, dimensions: int = 2) -> list[int]:
    """Return a tensor's shape. Raises UserError if the tensor is missing or has another number of dimensions."""
    if name not in tensors:
        raise UserError(f"{path}: not a MiniMind model: {name} is missing; the file has {_some(tensors)}")
    if tensors[name].ndim != dimensions or 0 in tensors[name].shape:
        raise UserError(f"{path}: {name} has shape {list(tensors[name].shape)}, not {dimensions} dimensions")
    return list(tensors[name].shape)


def _valid_shape(path: Path, **settings: Any) -> ModelShape:
    """Return the shape with these settings. Raises UserError if no model can have them."""
    try:
        return ModelShape(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        hint = "; set num_attention_heads if it is not the default" if "head" in first["msg"] else ""
        raise UserError(f"{path}: {where}{first['msg']}{hint}") from None


def _require_normalised(path: str | Path, per_token: int, norm_topk_prob: bool) -> None:
    """Raise UserError if the weights of a token's experts do not add up to 1 in a MiniMind-2 model."""
    if per_token == 1:
        raise UserError(
            f"{path}: MiniMind-2 weights a token's only expert by its probability, which no Hugging Face architecture "
            "does; with 2 or more experts per token the weights add up to 1 in both"
        )
    if not norm_topk_prob:
        raise UserError(
            f"{path}: norm_topk_prob is false, so the weights of a token's experts do not add up to 1; no Hugging Face "
            "architecture has such experts, so this model cannot be converted"
        )


def _require_fit(path: Path, sizes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError with the first three tensors that are missing, unknown, or of a wrong size."""
    problems = [f"{name} is missing" for name in expected if name not in sizes]
    problems += [f"{k} is {list(sizes[k])}, not {list(v)}" for k, v in expected.items() if sizes.get(k, v) != v]
    problems += [f"{name} is unknown" for name in sizes if name not in expected]
    if problems:
        raise UserError(f"{path}: does not fit: {'; '.join(problems[:3])}")


def _some(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(islice(tensors, 3)) or "nothing"


def _write(tensors: Mapping[str, Tensor], path: Path, dtype: str) -> None:
    """Write tensors with torch.save in `dtype`. A tensor under two names is stored once."""
    stored = {id(tensor): tensor.to(DTYPES[dtype]).contiguous() for tensor in tensors.values()}
    for name, tensor in tensors.items():
        if not stored[id(tensor)].isfinite().all():
            raise UserError(f"{path}: {name} has values that {dtype} cannot hold; export as float32")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: stored[id(tensor)] for name, tensor in tensors.items()}, path)
