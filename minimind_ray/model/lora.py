"""LoRA adapters: y = x Wᵀ + s · x Aᵀ Bᵀ with frozen W, saved as PEFT directories.

    N tokens   I, O a projection's inputs and outputs   R rank   W [O, I]   A [R, I]   B [O, R]

`add_lora` puts new adapters on a model in place, `load_adapter` puts an adapter from disk on it, and `merge_lora` turns
the model into a plain one again. Merge before generating: an adapter costs two more products per projection, and DoRA
also a norm of every weight in each pass.

A directory has the files that `peft` reads:

    adapter_config.json         rank, scale, names of the projections, path of the base
    adapter_model.safetensors   A and B; the metadata has `base_fingerprint`, the hash of the base
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimind_ray.config.errors import UserError
from minimind_ray.config.reading import read_json, require_own
from minimind_ray.config.schema import LoraConfig
from minimind_ray.data.hub import hub_ref
from minimind_ray.data.storage import is_url
from minimind_ray.model.families.granite_moe_shared import saves as is_granite
from minimind_ray.model.moe import MixtureOfExperts

M = TypeVar("M", bound=nn.Module)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INIT_STD = 0.02
NEVER_ADAPTED = ("lm_head", "gate")  # The vocabulary projection (as in peft's all-linear), and the experts' router.
PREFIX, EMBEDDING = "base_model.model.", "model.embed_tokens.weight"
SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# Fields of an adapter_config.json that `load_adapter` reads or ignores. It ignores fields without effect on a trained
# adapter: the choice of modules (the tensors' names show it), the start of training, the adapter's origin, and whether
# biases were trained (the file would then have their tensors, which are refused).
KNOWN_FIELDS = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights",
    "modules_to_save",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying", "inference_mode", "bias",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
}  # fmt: skip
# Values of init_lora_weights that leave the base's weights unchanged. With other values the adapter was trained on
# weights that differ from the base it names.
KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
MERGE_IN_PEFT = "merge the adapter in peft (merge_and_unload), save the model, and use that"


class LoraLinear(nn.Module):
    """A frozen projection and its adapter. With B = 0 the result is exactly the projection's.

    LoRA (Hu et al. 2021, eq. 3): x Wᵀ + s · dropout(x) Aᵀ Bᵀ. DoRA (Liu et al. 2024, eq. 5) multiplies this, row by
    row, by m / ‖W + s B A‖; m is trained, and the norm counts as a constant for the gradient (section 4.3). A bias is
    added last and is not trained.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        super().__init__()
        self.config, self.scale = config, config.scale
        self.weight = base.weight.requires_grad_(False)
        self.bias: nn.Parameter | None = base.bias
        self.lora_A = nn.Parameter(self.weight.new_zeros(config.rank, base.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(base.out_features, config.rank))
        self.dropout = nn.Dropout(config.dropout)
        self.magnitude = nn.Parameter(self._first_magnitude()) if config.dora else None

    def forward(self, x_NI: Tensor) -> Tensor:
        """Map [N, I] to [N, O]."""
        if torch.is_autocast_enabled(x_NI.device.type):
            x_NI = x_NI.to(torch.get_autocast_dtype(x_NI.device.type))  # One cast serves both products.
        h_NR = F.linear(self.dropout(x_NI), self.lora_A) * self.scale
        # Add to the projection's output in place: another pass over [N, O] costs as much as the product with B.
        if self.magnitude is None:
            y_NO = F.linear(x_NI, self.weight, self.bias)
            return y_NO.addmm_(h_NR, self.lora_B.to(y_NO.dtype).t())
        y_NO = F.linear(x_NI, self.weight)
        y_NO.addmm_(h_NR, self.lora_B.to(y_NO.dtype).t())
        y_NO = y_NO * (self.magnitude / self.row_norms()).to(y_NO.dtype)
        return y_NO if self.bias is None else y_NO + self.bias.to(y_NO.dtype)

    def _first_magnitude(self) -> Tensor:
        # A model on the meta device has no values to compute norms of, and autocast does not support that device.
        return self.weight.new_empty(len(self.weight)) if self.weight.is_meta else self.row_norms()

    def summed_weight(self) -> Tensor:
        """Return W + s B A in the weights' own dtype, even inside autocast."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.scale)

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Return ‖W + s B A‖ of each row, [O]."""
        return torch.linalg.vector_norm(self.summed_weight(), dim=1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight of a plain projection with the same result."""
        if self.magnitude is None:
            return self.summed_weight()
        return self.summed_weight() * (self.magnitude / self.row_norms()).unsqueeze(1)


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze the model and put adapters on the projections that `config.targets` names: A ~ N(0, 0.02), B = 0.

    The same seed gives the same A on every worker and device.

    Raises:
        UserError: the model has no such projections, PEFT cannot express this choice of the experts' projections, or
            the rank is larger than that of every chosen projection.
    """
    generator = torch.Generator().manual_seed(seed)
    names, linears = target_names(model, config.targets), _projections(model)
    most = max(min(linears[name].weight.shape) for name in names)
    if config.rank > most:
        raise UserError(f"lora.rank is {config.rank}, but no matrix of lora.targets has more than rank {most}")
    _wrap(model, names, config)
    for layer in adapters(model).values():
        layer.lora_A.data.copy_(torch.empty(layer.lora_A.shape).normal_(std=INIT_STD, generator=generator))


def target_names(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Return the full names of the projections for `lora.targets`: square, all-linear, or the last parts of names.

    Raises:
        UserError: no projection has this name, or no projection is square.
    """
    linears = _projections(model)
    if targets in (["all-linear"], ["square"]):
        (targets,) = targets
    if targets == "all-linear":
        return list(linears)
    if targets == "square":
        square = [name for name, linear in linears.items() if linear.weight.shape[0] == linear.weight.shape[1]]
        if not square:
            raise UserError(f"lora.targets is square, but this model has no square projection; use {_valid(linears)}")
        return square
    leaves = {targets} if isinstance(targets, str) else set(targets)
    if unknown := sorted(leaves - {_leaf(name) for name in linears}):
        raise UserError(f"lora.targets: {unknown[0]!r} is unknown; use square, {_valid(linears)}")
    return [name for name in linears if _leaf(name) in leaves]


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted projections by full name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merge_lora(model: M) -> M:
    """Add the adapters to the weights, in place. Return the same model, now plain and entirely trainable."""
    for name, layer in adapters(model).items():
        rows, columns = layer.weight.shape
        plain = nn.Linear(columns, rows, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.merged_weight())
        plain.register_parameter("bias", layer.bias)
        _replace(model, name, plain)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base_path: str | Path,
    base_fingerprint: str,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model's adapters as a PEFT directory that refers to the base by path and fingerprint.

    The path of a base of the hub is hf://OWNER/NAME@COMMIT. It is written as peft does: name and revision.
    `weights`, if given, are written instead of the model's: a copy of `adapter_weights(model)`, float32, on the CPU.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    layers = adapters(model)
    config = next(iter(layers.values())).config
    leaves = sorted({_leaf(name) for name in layers})
    # PEFT refuses dropout on experts. It also fuses gate and up into one adapter of twice the rank, so its rsLoRA scale
    # would differ. So adapters of experts are written without dropout, and with the scale of plain LoRA.
    experts = _on_experts(layers)
    alpha = config.rank if config.alpha is None else config.alpha
    of_hub = hub_ref(base_path) if is_url(base_path) else None
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": of_hub.name if of_hub else str(base_path),
        **({"revision": of_hub.revision} if of_hub else {}),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank if experts else alpha,
        "lora_dropout": 0.0 if experts else config.dropout,
        "use_rslora": config.rslora and not experts,
        "use_dora": config.dora,
        "target_modules": leaves if list(layers) == target_names(model, leaves) else list(layers),
        "bias": "none",
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if weights is None:
        weights = {key: p.detach().float().cpu().contiguous() for key, p in adapter_weights(model).items()}
    # A single entry: safetensors writes several entries in random order, which would change the file's hash.
    save_file(dict(weights), folder / WEIGHTS, metadata={"base_fingerprint": base_fingerprint})


class AdapterBase(NamedTuple):
    """The base that an adapter names. `fingerprint` is None if another program wrote the adapter."""

    path: str | None
    fingerprint: str | None


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, not a whole model."""
    return (directory / CONFIG).exists() and not (directory / "config.json").exists()


def adapter_base(directory: str | Path) -> AdapterBase:
    """Return the base that the adapter in a PEFT directory names.

    Raises:
        UserError: the directory cannot be read.
    """
    folder = Path(directory)
    config, metadata = _read_config(folder), _open(folder).metadata() or {}
    path, revision = config.get("base_model_name_or_path"), config.get("revision")
    if path is not None and revision and (of_hub := hub_ref(str(path))):
        path = replace(of_hub, revision=str(revision))
    return AdapterBase(None if path is None else str(path), metadata.get("base_fingerprint"))


def load_adapter(model: nn.Module, directory: str | Path, base_fingerprint: str) -> None:
    """Put the adapter of a PEFT directory on a plain model, or load its values into the model's existing adapters.

    Weights of `modules_to_save` replace the model's weights. `base_fingerprint` is the model's own fingerprint (see
    `model_fingerprint`). If this function raises, the model has not changed.

    Raises:
        UserError: the directory cannot be read, uses an unsupported feature, does not fit the model, or was trained on
            another model.
    """
    folder = Path(directory)
    config, file = _lora_config(folder), _open(folder)
    trained_on = adapter_base(folder)
    if trained_on.fingerprint not in (None, base_fingerprint):
        raise UserError(
            f"{folder}: trained on {trained_on.path} with config and weights of hash {trained_on.fingerprint:.12}, "
            f"not on this model (hash {base_fingerprint:.12}); put it on its own base"
        )
    sizes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    replaced = _replaced_weights(model, folder)
    names = _adapted_names(model, folder, config, sizes, replaced)
    if layers := adapters(model):
        # Scales may differ by rounding: adapters of experts store alpha = scale · rank.
        same = all(
            (layer.config.rank, layer.config.dora) == (config.rank, config.dora)
            and math.isclose(layer.scale, config.scale)
            for layer in layers.values()
        )
        if list(layers) != names or not same:
            raise UserError(
                f"{folder}: the model already has an adapter of another shape; use the lora section it was trained with"
            )
    else:
        _wrap(model, names, config)
    for key, parameter in (replaced | adapter_weights(model)).items():
        parameter.data.copy_(file.get_tensor(key))


def saved_modules(directory: str | Path) -> list[str]:
    """Return the modules that a PEFT directory stores whole (`modules_to_save`), often embed_tokens or lm_head.

    Raises:
        UserError: its config cannot be read, or modules_to_save is not a list of names.
    """
    folder = Path(directory)
    modules = _read_config(folder).get("modules_to_save") or []
    if not (isinstance(modules, list) and all(isinstance(m, str) and m for m in cast("list[object]", modules))):
        raise UserError(f"{folder / CONFIG}: modules_to_save is {modules!r}, not a list of module names")
    return cast("list[str]", modules)


def _replaced_weights(model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
    """Return the model's weights inside `modules_to_save`, by their names in the adapter file."""
    modules, where = saved_modules(folder), f"{folder / CONFIG}: modules_to_save"
    weights = {name: p for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))}
    # As in peft, a name matches the end of a module's path: `norm` also matches every input_layernorm.
    inside = {module: [name for name in weights if f"{module}." in name] for module in modules}
    for module, names in inside.items():
        if "lm_head.weight" not in weights and (EMBEDDING in names or f"{module}." in "lm_head."):
            raise UserError(
                f"{where} has {module!r}, but the base's embedding and lm_head are one tensor (tie_word_embeddings), "
                f"of which the adapter changes one side; {MERGE_IN_PEFT}"
            )
        if not names:
            raise UserError(f"{where} has {module!r}, which the base does not have; name the base it was trained on")
    return {f"{PREFIX}{name}": weights[name] for name in dict.fromkeys(chain(*inside.values()))}


def _adapted_names(
    model: nn.Module,
    folder: Path,
    config: LoraConfig,
    sizes: Mapping[str, tuple[int, ...]],
    replaced: Mapping[str, nn.Parameter],
) -> list[str]:
    """Return the projections that an adapter file has tensors for, in the model's order.

    Raises UserError if a tensor is unknown, missing or of a wrong size.
    """
    linears = _projections(model)
    names = [name for name in linears if f"{PREFIX}{name}.{SUFFIXES['lora_A']}" in sizes]
    expected = {key: tuple(parameter.shape) for key, parameter in replaced.items()}
    for name in names:
        rows, columns = linears[name].weight.shape
        expected[f"{PREFIX}{name}.{SUFFIXES['lora_A']}"] = (config.rank, columns)
        expected[f"{PREFIX}{name}.{SUFFIXES['lora_B']}"] = (rows, config.rank)
        if config.dora:
            expected[f"{PREFIX}{name}.{SUFFIXES['magnitude']}"] = (rows,)
    problems = [f"{key} is unknown" for key in sorted(sizes.keys() - expected.keys())]
    problems += [f"{key} is missing" for key in expected if key not in sizes]
    problems += [f"{k} is {list(sizes[k])}, not {list(v)}" for k, v in expected.items() if sizes.get(k, v) != v]
    if problems or not names:
        raise UserError(f"{folder}: does not fit the model: {'; '.join(problems[:3]) or 'it holds no tensors'}")
    return names


def _wrap(model: nn.Module, names: list[str], config: LoraConfig) -> None:
    assert not adapters(model)
    if _on_experts(names):
        leaves = {_leaf(name) for name in names}
        if config.dora:
            raise UserError(
                "lora.dora is on, but PEFT has no DoRA for experts; turn it off, or name other lora.targets"
            )
        if len(leaves & {"gate_proj", "up_proj"}) == 1:
            raise UserError("lora.targets: PEFT adapts experts' gate_proj and up_proj as one; name both or neither")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        _replace(model, name, LoraLinear(base, config).train(base.training))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _projections(model: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """Return the projections that have an adapter or can get one, by full name."""
    # Leave out the experts of GraniteMoeShared, because PEFT would look for other tensors under other names.
    never = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, MixtureOfExperts) and is_granite(m.shape))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | LoraLinear)
        and _leaf(name) not in NEVER_ADAPTED
        and not name.startswith(never)
    }


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by PEFT's names."""
    return {
        f"{PREFIX}{name}.{suffix}": parameter
        for name, layer in adapters(model).items()
        for own, suffix in SUFFIXES.items()
        if (parameter := getattr(layer, own)) is not None
    }


def _on_experts(names: Iterable[str]) -> bool:
    return any(".experts." in name for name in names)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _valid(linears: Iterable[str]) -> str:
    return ", ".join(["all-linear", *dict.fromkeys(_leaf(name) for name in linears)])


def _lora_config(folder: Path) -> LoraConfig:
    content = _read_config(folder)
    for key, supported in {"peft_type": ["LORA"], "task_type": [None, "CAUSAL_LM"]}.items():
        if content.get(key) not in supported:
            raise UserError(f"{folder / CONFIG}: {key} is {content.get(key)!r}; only {supported[-1]} is supported")
    if other := [key for key, value in content.items() if value and key not in KNOWN_FIELDS]:
        raise UserError(
            f"{folder / CONFIG}: {other[0]} is set to {content[other[0]]!r}, which is not supported; {MERGE_IN_PEFT}"
        )
    begun = content.get("init_lora_weights")
    if begun not in KEEPS_BASE:
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights is {begun!r}, which can change the base's weights too; save it with "
            "peft's path_initial_model_for_weight_conversion, or merge it there"
        )
    fields = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
    if missing := [key for key in ("r", "lora_alpha") if key not in content]:
        raise UserError(f"{folder / CONFIG}: {missing[0]} is missing")
    try:
        return LoraConfig.model_validate({own: content[key] for own, key in fields.items() if key in content})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{folder / CONFIG}: {fields[str(first['loc'][0])]}: {first['msg']}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG, "; name a PEFT adapter directory")


def _open(folder: Path) -> Any:
    path = folder / WEIGHTS
    require_own(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
