"""The plan of a run, for `plan`: the model, the amount of data, the steps, and the memory and compute that they take.

Making a plan starts no Ray and writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.data.estimate import Estimate, estimate
from minimind_ray.data.prepare import find_prepared
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.storage import require_writable
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.lora import add_lora
from minimind_ray.model.transformer import Transformer
from minimind_ray.stages.start import check_stage, load_tokenizer, model_shape, require_sources, require_used
from minimind_ray.train.context import default_device, resolve_precision
from minimind_ray.train.footprint import Footprint, footprint
from minimind_ray.train.throughput import training_flops_per_token


@dataclass(frozen=True)
class Epoch:
    """The size of one pass over the training data. `source` says how the numbers were obtained."""

    documents: int
    tokens: int
    counted: int
    packs: int
    source: str


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run. `config` has its paths resolved; a forward pass takes `pass_tokens` tokens."""

    config: Config
    shape: ModelShape
    epoch: Epoch
    sample: Estimate
    packs_per_step: int
    pass_tokens: int
    dtype: torch.dtype
    memory: Footprint

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(self.epoch.packs / self.packs_per_step)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.config.train.max_steps or self.steps_per_epoch * self.config.train.epochs

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward in all steps, counted as for MFU."""
        tokens = self.epoch.tokens / self.steps_per_epoch * self.steps
        return tokens * training_flops_per_token(self.shape, self.sample.mean_context, self.config.trains_adapter)

    @property
    def fullness(self) -> float:
        """The fraction of the packs' capacity that tokens fill."""
        return self.epoch.tokens / (self.epoch.packs * self.config.data.pack_tokens)


def plan_run(config: Config) -> RunPlan:
    """Estimate data, steps and memory of the run that `config` describes.

    Raises:
        UserError: the run itself would raise the same error before it trains.
    """
    config = resolve_paths(config)
    data = config.data
    require_writable(config.out, data.cache_dir, probe=False)
    packs_per_step = config.packs_per_step()
    require_sources([config])
    if not data.cache and config.train.max_steps is None:
        raise UserError("train.max_steps is not set: with data.cache false, the run needs it to end")
    tokenizer = load_tokenizer(config)
    require_used(config)
    check_stage(config, tokenizer)
    shape = model_shape(config, tokenizer)
    sample = estimate(config.stage, data, tokenizer, config.eval.cluster)
    epoch = _epoch(config, tokenizer, sample)
    if not epoch.packs:
        first = sample.reasons[0].first if sample.reasons else None
        why = f": {first.file}:{first.line}: {first.reason}" if first else ""
        raise UserError(f"data.train: no row of {data.train} is left to train on{why}")
    dtype = resolve_precision(config.train.precision, default_device())
    # `auto` depends on the GPU, and the plan may be made on a machine without it.
    pass_tokens = 0 if config.batch.pass_tokens == "auto" else config.batch.pass_tokens
    pass_tokens = max(data.pack_tokens, min(pass_tokens, config.batch.tokens // config.scale.most))
    memory = footprint(
        shape, _adapt(config),
        pack_tokens=pass_tokens, document=2 * sample.mean_context, counted=epoch.counted / epoch.tokens,
        dtype=dtype,
    )  # fmt: skip
    return RunPlan(config, shape, epoch, sample, packs_per_step, pass_tokens, dtype, memory)


def _epoch(config: Config, tokenizer: Tokenizer, sample: Estimate) -> Epoch:
    """Return the epoch's exact size if its data is in the cache, otherwise an estimate from the sample."""
    key = config.stage, config.data, "train", tokenizer, config.eval.cluster
    if manifest := find_prepared(*key) if config.data.cache else None:
        documents, tokens, counted = (manifest.total(n) for n in ("documents", "tokens", "counted_tokens"))
        return Epoch(documents, tokens, counted, manifest.n_packs, "exact, because the data is prepared already")
    return Epoch(
        sample.documents, sample.tokens, sample.counted, sample.packs,
        f"estimated from {sample.sampled:,} of about {sample.rows:,} rows",
    )  # fmt: skip


def _adapt(config: Config) -> Callable[[Transformer], None]:
    """Return a function that puts the stage's adapters on a model, or does nothing if it trains no adapters."""
    if config.trains_adapter:
        return lambda model: add_lora(model, config.lora, seed=config.train.seed)
    return lambda model: None
