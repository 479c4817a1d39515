"""Evaluate a trained model on files, as a validation does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.schema import Config
from minimind_ray.data.pack import Pack
from minimind_ray.data.prepare import Prepared, prepare
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.store import PackStore
from minimind_ray.stages.base import base_at
from minimind_ray.stages.columns import FrozenColumn, compute_here, dtype_here, ensure_column
from minimind_ray.stages.stage import stage_of
from minimind_ray.stages.start import whole_model
from minimind_ray.stages.use import open_trained
from minimind_ray.train.evaluate import Evaluation, evaluate, packs_within


def measure(
    config: Config, model: str, adapter: str | None, reference: str | None, say: Callable[[str], None]
) -> tuple[Evaluation, dict[str, Any]]:
    """Evaluate a model on `data.val`. Return each example's result, and the means by name in the order to show them.

    `reference` is the model that computes the stage's columns, such as the reference model of preference data.

    Raises:
        UserError: the model does not exist, no row is left to measure on, or a reference is given although the stage or
            the loss has none.
    """
    stage = stage_of(config)
    if reference is not None and not stage.columns(config):
        settings = " and ".join(f"{key} {attrgetter(key)(config)}" for key in stage.column_keys)
        raise UserError(f"{settings or f'stage {config.stage}'} has no reference model: leave --reference out")
    trained = open_trained(model, adapter=adapter, precision=config.train.precision)
    config = resolve_paths(config)
    prepared = prepare(config.stage, config.data, "val", trained.tokenizer, cluster=config.eval.cluster)
    say(prepared.summary())
    if not prepared.manifest.n_packs:
        raise UserError(f"{config.data.val}: no row is left to measure on; see {prepared.rejects}")
    objective = stage.objective(config, trained.model.shape)
    count = packs_within(PackStore(prepared.path), config.eval.max_tokens)
    if count < prepared.manifest.n_packs:
        say(f"measured on the first {count:,} packs, as eval.max_tokens {config.eval.max_tokens:,} says")
    evaluation = evaluate(
        trained.model, objective, islice(_packs(config, prepared, reference), count),
        token_bytes_V=torch.from_numpy(trained.tokenizer.token_bytes()).to(trained.device),
        device=trained.device, dtype=trained.dtype,
    )  # fmt: skip
    facts: dict[str, Any] = {"model": model, "examples": len(evaluation.examples["example"])}
    clusters = len(np.unique(evaluation.examples["cluster"]))
    if clusters != facts["examples"]:
        facts[stage.record.clusters(config.eval.cluster)] = clusters
    if objective.unit == "token":
        facts["tokens"] = int(evaluation.examples["count"].sum())
    return evaluation, facts | stage.report(config, evaluation, reference is not None)


def _packs(config: Config, prepared: Prepared, reference: str | None) -> Iterable[Pack]:
    """Return the prepared packs with the objective's columns, computed by the model `reference`; 0 if it is None."""

    columns = stage_of(config).columns(config)
    if reference is None:
        zeros = [(s.column, "lengths" if s.column.axis == "document" else "tokens") for s in columns]
        return (
            replace(pack, columns={**pack.columns, **{c: np.zeros(len(getattr(pack, k)), c.dtype) for c, k in zeros}})
            for pack in PackStore(prepared.path, prepared.columns)
        )
    base = base_at(whole_model(reference, "--reference"))
    files = [FrozenColumn(scored, prepared.path, base, dtype_here(config.train.precision)) for scored in columns]
    for frozen in files:
        ensure_column(frozen, compute_here)
    return PackStore(prepared.path, prepared.columns | {frozen.scored.column: frozen.path for frozen in files})
