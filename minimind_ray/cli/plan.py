"""`minimind-ray train STAGE --dry-run`: what the run would be, without Ray and without writing anything."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from minimind_ray.config.schema import Config, ScaleConfig
    from minimind_ray.data.estimate import Estimate
    from minimind_ray.data.tokenizer import Tokenizer
    from minimind_ray.model.transformer import Transformer


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data, and how that is known."""

    documents: int
    tokens: int
    counted: int
    packs: int
    source: str


def print_plan(config: Config) -> None:
    """Print what `plan` finds, a line for each."""
    for name, text in plan(config).items():
        print(f"{name:<10} {text}")


def plan(config: Config) -> dict[str, str]:
    """Parameters, data, steps, FLOPs, memory and resources of the run that `config` describes.

    Raises:
        UserError: what the run itself would refuse before it trains.
    """
    from minimind_ray.config.errors import UserError
    from minimind_ray.data.estimate import estimate
    from minimind_ray.data.shipped import resolve_paths
    from minimind_ray.data.storage import require_writable
    from minimind_ray.model.families import config_of
    from minimind_ray.stages.stage import stage_of
    from minimind_ray.stages.start import check_stage, load_tokenizer, model_shape, require_sources, require_used
    from minimind_ray.train.context import default_device, resolve_precision
    from minimind_ray.train.footprint import footprint
    from minimind_ray.train.run import RunDirectory
    from minimind_ray.train.schedule import shortfall
    from minimind_ray.train.throughput import parameter_counts, training_flops_per_token

    config = resolve_paths(config)
    require_writable(config.out, config.data.cache_dir, probe=False)
    data, scale, run = config.data, config.scale, RunDirectory(config.out)
    packs_per_step = config.packs_per_step()
    require_sources([config])
    if not data.cache and config.train.max_steps is None:
        raise UserError("train.max_steps is not set: with data.cache false nothing else says where the run ends")
    tokenizer = load_tokenizer(config)
    require_used(config)
    check_stage(config, tokenizer)
    shape = model_shape(config, tokenizer)
    sample = estimate(config.stage, data, tokenizer)
    epoch = _epoch(config, tokenizer, sample)
    if not epoch.packs:
        first = sample.reasons[0].first if sample.reasons else None
        why = f": {first.file}:{first.line}: {first.reason}" if first else ""
        raise UserError(f"data.train: no row of {data.train} is left to train on{why}")
    steps_per_epoch = math.ceil(epoch.packs / packs_per_step)
    steps = config.train.max_steps or steps_per_epoch * config.train.epochs
    tokens = epoch.tokens / steps_per_epoch * steps
    flops = tokens * training_flops_per_token(shape, sample.mean_context, config.trains_adapter)
    total, active = parameter_counts(shape)
    dtype = resolve_precision(config.train.precision, default_device())
    # `auto` depends on the GPU, which may not be here.
    pass_tokens = 0 if config.batch.pass_tokens == "auto" else config.batch.pass_tokens
    pass_tokens = max(data.pack_tokens, min(pass_tokens, config.batch.tokens // scale.most))
    memory = footprint(
        shape, _adapt(config),
        pack_tokens=pass_tokens, document=2 * sample.mean_context, counted=epoch.counted / epoch.tokens,
        dtype=dtype,
    )  # fmt: skip
    fullness = epoch.tokens / (epoch.packs * data.pack_tokens)
    lines = {
        "model": f"{config_of(shape)['architectures'][0]}, {total:,} parameters"
        + (f", {active:,} of them active for a token" if active < total else "")
        + (f"; {memory.trainable:,} are trained" if memory.trainable < total else ""),
        "data": f"{epoch.tokens:,} tokens an epoch in {epoch.documents:,} documents, {epoch.counted:,} of them carry "
        f"loss; {epoch.packs:,} packs, {fullness:.0%} full ({epoch.source})",
        "steps": f"{steps:,} ({steps_per_epoch:,} an epoch), each {config.batch.tokens:,} tokens = {packs_per_step} "
        f"packs of {data.pack_tokens:,}, {math.ceil(packs_per_step / scale.most)} on each worker",
        "compute": f"{flops / steps:.2g} FLOPs a step, {flops:.2g} in all, counted as for MFU",
        "memory": f"{_size(memory.total)} on each worker: {_size(memory.weights)} weights + {_size(memory.gradients)} "
        f"gradients + {_size(memory.optimizer)} AdamW + {_size(memory.activations)} activations of "
        f"{_pass(config, pass_tokens)} (estimated)",
        "workers": f"{scale.workers}, each with {scale.cpus_per_worker:g} CPUs and {scale.gpus_per_worker:g} GPUs; one "
        f"more CPU for the data; matrix products in {str(dtype).removeprefix('torch.')} where hardware is as here"
        f"{missing_gpus(scale)}",
        "run": f"{run.where}{', which holds a run already' if run.file('config.yaml').exists() else ''}",
    }
    if warning := shortfall(config.schedule, steps):
        lines["warning"] = warning
    for scored in stage_of(config).columns(config):
        what = "one forward pass over the data first, unless it was made for this data and base before"
        lines[scored.column.name] = what
    if sample.rejected:
        first = sample.reasons[0].first
        lines["rejected"] = (
            f"{sample.rejected:,} of {sample.sampled:,} sampled rows, as {first.file}:{first.line}: {first.reason}"
        )
        if sample.rejected > data.max_reject_fraction * sample.sampled:
            lines["rejected"] += f"; data.max_reject_fraction {data.max_reject_fraction:g} allows fewer: it would stop"
    if sample.remarks:
        lines["rows"] = "in the sample, " + "; ".join(sample.remarks)
    return lines


def missing_gpus(scale: ScaleConfig) -> str:
    """What a plan adds where the workers ask for GPUs and this machine, on which no RAY_ADDRESS is set, has none."""
    import torch

    if not scale.gpus_per_worker or "RAY_ADDRESS" in os.environ or torch.cuda.is_available():
        return ""
    return "; this machine has no GPU: use a cluster that has GPUs, or set scale.gpus_per_worker to 0"


def _pass(config: Config, tokens: int) -> str:
    if config.batch.pass_tokens != "auto":
        return f"a pass of {tokens:,} tokens"
    return "a pack" + ("; a GPU takes as many at once as it has memory for" if config.scale.gpus_per_worker else "")


def _epoch(config: Config, tokenizer: Tokenizer, sample: Estimate) -> Epoch:
    """From the cache if all is prepared there, else from the sample."""
    from minimind_ray.data.prepare import find_prepared

    manifest = find_prepared(config.stage, config.data, "train", tokenizer) if config.data.cache else None
    if manifest:
        documents, tokens, counted = (manifest.total(n) for n in ("documents", "tokens", "counted_tokens"))
        return Epoch(documents, tokens, counted, manifest.n_packs, "exact, they are prepared already")
    return Epoch(
        sample.documents, sample.tokens, sample.counted, sample.packs,
        f"estimated from {sample.sampled:,} of about {sample.rows:,} rows",
    )  # fmt: skip


def _adapt(config: Config) -> Callable[[Transformer], None]:
    """Puts the adapters on a model that the stage trains, if it trains adapters."""
    from minimind_ray.model.lora import add_lora

    if config.trains_adapter:
        return lambda model: add_lora(model, config.lora, seed=config.train.seed)
    return lambda model: None


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
