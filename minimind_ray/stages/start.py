"""Load the tokenizer and the model that a stage starts from. Check that the config fits them before work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import config_keys
from minimind_ray.config.schema import PRESETS, Config, ModelConfig, ModelShape
from minimind_ray.config.stages import STAGES
from minimind_ray.data.records import require_files
from minimind_ray.data.storage import StoreError, is_url
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import check_model, load_model, load_shape
from minimind_ray.model.lora import add_lora, is_adapter
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.stage import Use, stage_of
from minimind_ray.train.context import Context
from minimind_ray.train.run import resolve_model


def load_tokenizer(config: Config, base: Path | None = None) -> Tokenizer:
    """Load `data.tokenizer`, or the tokenizer of `init_from`. `base` is the directory of `init_from`, if known already.

    Raises:
        UserError: neither setting is given, the tokenizer cannot be read, or the stage needs a base and has none.
    """
    if config.data.tokenizer:
        return Tokenizer.load(config.data.tokenizer)
    if config.init_from or config.record.needs_base:
        return Tokenizer.load(base or require_base(config))
    raise UserError(
        "data.tokenizer is not set: give a directory with tokenizer.json or a model of the hub, or make one "
        "with minimind-ray tokenizer train"
    )


def model_shape(config: Config, tokenizer: Tokenizer, base: Path | None = None) -> ModelShape:
    """Return the shape of the model to train, from `init_from` or from section model. `base` is as in `load_tokenizer`.

    Raises:
        UserError: section model or data.tokenizer does not agree with `init_from`.
    """
    if not config.init_from:
        return config.model.shape(tokenizer.vocab_size)
    base = base or Path(require_base(config))
    shape = load_shape(base)
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"init_from {config.init_from} has {shape.vocab_size} tokens, fewer than the tokenizer's "
            f"{tokenizer.vocab_size}; leave data.tokenizer out to use the model's own tokenizer"
        )
    if config.data.tokenizer and (base / "tokenizer.json").exists():
        own = Tokenizer.load(base)
        if not tokenizer.extends(own):
            raise UserError(
                f"data.tokenizer {config.data.tokenizer} has other tokens than the tokenizer of init_from "
                f"{config.init_from}; leave data.tokenizer out"
            )
        if config.trains_adapter and own.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"data.tokenizer {config.data.tokenizer} differs from the tokenizer of init_from {config.init_from}, "
                "but its adapters are used with that tokenizer; leave data.tokenizer out, or train all weights"
            )
    _require_agreement(config, shape)
    return shape


def _require_agreement(config: Config, shape: ModelShape) -> None:
    """Raise UserError if a setting of section model differs from the base's `shape`."""
    found, preset, given = shape.model_dump(), config.model.preset, config.model.given
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


def check_stage(config: Config, tokenizer: Tokenizer, base: Path | None = None) -> None:
    """Check that the stage can begin, before its data is prepared. `base` is as in `load_tokenizer`; it is not checked.

    Raises:
        UserError: the stage needs a base and has none, or its shape, adapter or loss does not fit.
    """
    if not base and (config.init_from or config.record.needs_base):
        check_model(require_base(config))
    shape = model_shape(config, tokenizer, base)
    if config.trains_adapter:
        with torch.device("meta"):
            model = Transformer(shape)
        add_lora(model, config.lora, seed=0)
    stage_of(config).objective(config, shape)


def _has_experts(config: Config) -> bool:
    # `model_shape` checks whether a base has experts.
    model = config.model
    return bool(model.given.get("num_experts") or config.init_from or PRESETS[model.preset].get("num_experts"))


EXPERTS = ("num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef")
USES = (
    Use("lora.", lambda c: c.trains_adapter, lambda c: f"this run trains no adapter; leave it out, or {_adapting(c)}"),
    Use(
        "schedule.decay",
        lambda c: c.schedule.name == "wsd",
        lambda c: f"schedule.name {c.schedule.name} has no such part; leave it out, or use wsd",
    ),
    Use(
        "schedule.final",
        lambda c: c.schedule.name != "constant",
        lambda c: "schedule.name constant never lowers the learning rate; leave it out, or use another schedule",
    ),
    *(
        Use(f"model.{key}", _has_experts, lambda c: "the model has no experts; leave it out, or set model.num_experts")
        for key in EXPERTS
    ),
    Use("train.epochs", lambda c: not c.train.max_steps, lambda c: "train.max_steps ends the run", shared=True),
    Use(
        "data.long_documents",
        lambda c: c.record.rows == "text",
        lambda c: f"stage {c.stage} has data.long_conversations",
        shared=True,
    ),
    Use(
        "data.long_conversations",
        lambda c: c.record.rows != "text",
        lambda c: f"stage {c.stage} has data.long_documents",
        shared=True,
    ),
)


def _adapting(config: Config) -> str:
    """Return, for a message, how to train an adapter instead."""
    adapters = config.record.adapters
    if adapters != "never":
        return f"set {adapters} too"
    return f"train stage {' or '.join(record.name for record in STAGES.values() if record.adapters == 'always')}"


def _of_other_stages(config: Config) -> Iterator[Use]:
    """Yield a rule for each section of another stage: this run does not use any of its settings."""
    for record in STAGES.values():
        if record.section and record.name != config.stage:
            why = f"section {record.name} is for stage {record.name}, not for {config.stage}"
            yield Use(f"{record.name}.", lambda c: False, lambda c, why=why: why, shared=True)


def unused(config: Config, key: str) -> Use | None:
    """Return the rule by which a run of this config does not use a setting; None if the run uses it."""
    every = (*USES, *stage_of(config).uses, *_of_other_stages(config))
    rules = (rule for rule in every if rule.key == key or rule.key.endswith(".") and key.startswith(rule.key))
    return next((rule for rule in rules if not rule.used(config)), None)


def effect(config: Config, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a sweep's point that a run of this config uses. Runs with the same settings are equal."""
    return {key: value for key, value in point.items() if not unused(config, key)}


def require_used(config: Config) -> None:
    """Reject settings that are not default and that this run does not use.

    Raises:
        UserError: there is such a setting.
    """
    default = Config(stage=config.stage)
    for key in config_keys():
        rule, value = unused(config, key), attrgetter(key)
        if rule and not rule.shared and value(config) != value(default):
            shown = f"{value(config):g}" if isinstance(value(config), float) else value(config)
            raise UserError(f"{key} is {shown}, but {rule.otherwise(config)}")


def initial_model(config: Config, tokenizer: Tokenizer, context: Context, base: Path | None = None) -> Transformer:
    """Return the model before the first step, on the context's device, the same on every worker.

    `base` is the directory of the base; None for a new model.
    """
    if base:
        model_shape(config, tokenizer, base)
        return load_model(base, context.device, context.base_weights(base))
    torch.manual_seed(config.train.seed)
    return Transformer(model_shape(config, tokenizer)).to(context.device)


def require_base(config: Config) -> str:
    """Return the directory of the model that the stage starts from.

    Raises:
        UserError: `init_from` is not set, or is not a whole model.
    """
    if not config.init_from:
        raise UserError(
            f"init_from is not set: {config.stage} starts from a trained model; "
            "give a run or a model directory, such as --init-from runs/pretrain"
        )
    return str(whole_model(config.init_from, "init_from"))


def require_sources(configs: Sequence[Config], tokenizer: str | None = None) -> None:
    """Check that the files, the tokenizer and the base of each run exist, before Ray starts.

    The results of earlier runs in the list and the directory `tokenizer` may not exist yet, so they are not checked.

    Raises:
        UserError: inputs are missing. The message names each run's base, tokenizer and first file that is missing. (If
            another input is missing, files in an object store are not checked: the store may take minutes to answer.)
    """
    made: dict[str, Config] = {}
    missing: dict[str, None] = {}
    seen = set[str]()
    for config in configs:
        base = made.get(config.init_from or "")
        if base and base.trains_adapter:
            raise UserError(f"{config.out}: init_from {base.out} is an adapter, not a whole model: give its base")
        made[config.out] = config
        inputs = repr((config.stage, config.data, config.init_from))
        if inputs in seen:  # Most trials of a sweep have the same inputs.
            continue
        seen.add(inputs)
        if config.data.train is None:
            raise UserError(
                f"data.train is not set for {config.out}: give the training files, such as --train 'data/*.jsonl'"
            )
        if base is None and (config.init_from or config.record.needs_base):
            _note(missing, partial(require_base, config))
        if config.data.tokenizer != tokenizer if config.data.tokenizer else base is None:
            _note(missing, partial(load_tokenizer, config))
        if not missing or not any(map(is_url, config.data.locations)):
            _note(missing, partial(require_files, config.data))
    if missing:
        raise UserError("; ".join(missing))


def _note(missing: dict[str, None], check: Callable[[], object]) -> None:
    """Add the message of the check's UserError, if it raises one."""
    try:
        check()
    except StoreError:
        raise
    except UserError as error:
        missing[str(error)] = None


def whole_model(path: str, name: str) -> Path:
    """Return the model directory at `path`, which is the user's value for the setting `name`.

    Raises:
        UserError: `path` is not a model, or is an adapter, which has no whole model's weights.
    """
    directory = resolve_model(path)
    if is_adapter(directory):
        raise UserError(
            f"{name} {path} is an adapter, not a whole model: merge it first (minimind-ray lora merge), "
            "or give its base"
        )
    return directory
