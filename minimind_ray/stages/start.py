"""What stages begin with: the tokenizer, and a model made new or taken from `init_from`."""

from __future__ import annotations

from pathlib import Path

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import PRESETS, Config, DpoConfig, LoraConfig, ModelConfig, ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import check_model, load_model, load_shape, load_weights, save_model
from minimind_ray.model.lora import add_lora, is_adapter
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.preference import Preference
from minimind_ray.train.context import Context
from minimind_ray.train.run import resolve_model
from minimind_ray.train.writer import HostCopy, Write


def load_tokenizer(config: Config) -> Tokenizer:
    """`data.tokenizer`, or the one that lies with `init_from`.

    Raises:
        UserError: neither is given, or it cannot be read; no base where the stage needs one.
    """
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    if config.init_from or config.stage != "pretrain":
        return Tokenizer.load(require_base(config))
    raise UserError(
        "data.tokenizer is not set: give a directory with tokenizer.json, or make one with minimind-ray tokenizer train"
    )


def model_shape(config: Config, tokenizer: Tokenizer) -> ModelShape:
    """The shape the stage trains: that of `init_from`, else what section model says.

    Raises:
        UserError: section model or data.tokenizer asks for something else than `init_from` is.
    """
    if not config.init_from:
        return config.model.shape(tokenizer.vocab_size)
    base = require_base(config)
    shape = load_shape(base)
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"init_from {config.init_from} has {shape.vocab_size} tokens, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}; leave data.tokenizer out to take the one it was trained with"
        )
    if config.data.tokenizer and (Path(base) / "tokenizer.json").exists():
        own = Tokenizer.load(base)
        if not tokenizer.extends(own):
            raise UserError(
                f"data.tokenizer {config.data.tokenizer} has other tokens than that of init_from {config.init_from}; "
                "leave data.tokenizer out"
            )
        if config.trains_adapter and own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer {config.data.tokenizer} is not the one of init_from {config.init_from}, with which "
                "its adapters are used; leave data.tokenizer out, or train all weights"
            )
    _require_agreement(config, shape)
    return shape


def _require_agreement(config: Config, shape: ModelShape) -> None:
    """Whether section model asks for nothing but what the base's `shape` is."""
    found, preset = shape.model_dump(), config.model.preset
    given = {k: v for k, v in config.model.model_dump(exclude={"preset"}).items() if v is not None}
    for key, value in given.items():
        if found[key] != value:
            raise UserError(
                f"model.{key} is {value}, but init_from {config.init_from} has {found[key]}; leave model.{key} out"
            )
    if preset == ModelConfig().preset:
        return
    for key, value in {"num_experts": 0, **PRESETS[preset]}.items():
        if key not in given and key != "initializer_range" and found[key] != value:
            raise UserError(
                f"model.preset {preset} has {key} {value}, but init_from {config.init_from} has {found[key]}; "
                "leave model.preset out"
            )


def check_stage(config: Config, tokenizer: Tokenizer) -> None:
    """Whether the stage can begin, before anything is prepared for it.

    Raises:
        UserError: no base where one is needed, a shape, adapter or loss that does not fit.
    """
    if config.init_from or config.stage != "pretrain":
        check_model(require_base(config))
    shape = model_shape(config, tokenizer)
    if config.trains_adapter:
        with torch.device("meta"):
            model = Transformer(shape)
        add_lora(model, config.lora, seed=0)
    if config.stage == "dpo":
        Preference(config.dpo, shape)


def require_used(config: Config) -> None:
    """Whether the settings that only some runs have a use for are used in this one.

    Raises:
        UserError: one that is not, and is not as it is by default.
    """
    if not config.trains_adapter:
        default = LoraConfig().model_dump()
        for key, value in config.lora.model_dump().items():
            if value != default[key]:
                how = "set dpo.lora too" if config.stage == "dpo" else "train stage lora"
                raise UserError(f"lora.{key} is {value}, but this run trains no adapter; leave it out, or {how}")
    gamma, loss = config.dpo.simpo_gamma, config.dpo.loss
    if config.stage == "dpo" and loss != "simpo" and gamma != DpoConfig().simpo_gamma:
        raise UserError(
            f"dpo.simpo_gamma is {gamma:g}, but dpo.loss {loss} has no such margin; leave it out, or use simpo"
        )


def initial_model(config: Config, tokenizer: Tokenizer, context: Context) -> Transformer:
    """The model before the first step, on the context's device; the same on every worker."""
    if config.init_from:
        model_shape(config, tokenizer)
        base = Path(require_base(config))
        return load_model(base, context.device, context.base_weights(base))
    torch.manual_seed(config.train.seed)
    return Transformer(model_shape(config, tokenizer)).to(context.device)


class WholeModel:
    """Checkpoints of all weights, as a Hugging Face model directory."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer, self.copy = model, tokenizer, HostCopy()

    def snapshot(self) -> Write:
        """Weights, config and tokenizer."""
        weights = self.copy(dict(self.model.named_parameters()))
        return lambda directory: save_model(self.model, self.tokenizer, directory, weights)

    def load(self, directory: Path) -> None:
        """The weights of a checkpoint of the same model."""
        load_weights(self.model, directory)


def require_base(config: Config) -> str:
    """The model directory that the stage starts from.

    Raises:
        UserError: `init_from` is not set, or is no whole model.
    """
    if not config.init_from:
        raise UserError(
            f"init_from is not set: {config.stage} starts from a trained model; "
            "give a run or a model directory, such as --init-from runs/pretrain"
        )
    return str(whole_model(config.init_from, "init_from"))


def whole_model(path: str, name: str) -> Path:
    """The model directory that `path`, the user's value for `name`, means.

    Raises:
        UserError: it is no model, or an adapter, which holds no weights to start from.
    """
    directory = resolve_model(path)
    if is_adapter(directory):
        raise UserError(
            f"{name} {path} is an adapter, not a whole model: merge it first (minimind-ray lora merge), "
            "or give its base"
        )
    return directory
