"""Validation: the objective for every example, the means over all of them, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ray.data.batch import batch_from_packs, passes
from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.step import Objective, autocast


@dataclass(frozen=True)
class Evaluation:
    """Means, and one row per example (document or pair), sorted by `example`.

    `examples` are float64 arrays: `loss` and `count` (summed over the example's counted items), the objective's
    metrics, for losses per token `bytes` of text; and `example`, int64, an id that is the same for the same
    validation set, so that two models can be compared example by example.
    """

    means: dict[str, float]
    examples: dict[str, np.ndarray]

    def write(self, path: Path) -> None:
        """The examples as Parquet."""
        pq.write_table(pa.table(self.examples), path)


def packs_within(store: PackStore, max_tokens: int | None) -> int:
    """How many packs of a validation set, from its first on, `eval.max_tokens` leaves to validate on."""
    if max_tokens is None:
        return store.n_packs
    return min(max(1, store.n_packs * max_tokens // store.n_tokens), store.n_packs)


def drop_stale(path: Path, loss: float) -> None:
    """Delete a file that `Evaluation.write` wrote, where its mean loss is another: it is of another checkpoint."""
    if not path.exists():
        return
    try:
        table = pq.read_table(path)
        found = float(table["loss"].to_numpy().sum() / table["count"].to_numpy().sum())
    except (pa.ArrowException, OSError, KeyError):
        found = math.nan
    if not math.isclose(found, loss):
        path.unlink()


@torch.no_grad()
def evaluate(
    model: Transformer,
    objective: Objective,
    packs: Iterable[Pack],
    *,
    token_bytes_V: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    pass_tokens: int = 0,
) -> Evaluation:
    """Evaluate this worker's packs, dropout off; the result holds all workers' examples, on every worker.

    Packs go through the model together up to `pass_tokens`, else one by one.

    For losses per token also `perplexity` = exp(loss) and `bits_per_byte`, the loss in bits over the bytes of text
    that the counted tokens stand for (`token_bytes_V` int32, 0 for control tokens), which compares tokenizers. Where
    they stand for none, there is neither it nor `bytes`.
    """
    was_training = model.training
    model.eval()
    columns: dict[str, list[np.ndarray]] = {}
    for together in passes(packs, pass_tokens):
        batch = batch_from_packs(together).to(device)
        with autocast(device, dtype):
            values = objective.examples(model, batch)
        if objective.unit == "token":
            bytes_N = token_bytes_V[batch.targets_N] * batch.weights_N
            values["bytes"] = torch.segment_reduce(bytes_N, "sum", lengths=batch.bounds_D1.diff().long().to(device))
        per_example = (len(batch.bounds_D1) - 1) // len(values["loss"])  # documents: a pair has two
        ids = np.concatenate([(pack.id << 20) + np.arange(len(pack.lengths) // per_example) for pack in together])
        arrays = {name: value.double().cpu().numpy() for name, value in values.items()}
        for name, array in {"example": ids, **arrays}.items():
            columns.setdefault(name, []).append(array)
    model.train(was_training)
    return _evaluation({name: np.concatenate(parts) for name, parts in columns.items()}, objective.unit)


def _evaluation(examples: dict[str, np.ndarray], unit: str) -> Evaluation:
    if dist.is_initialized():
        gathered: list[dict[str, np.ndarray]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, examples)
        # A worker with no packs has no columns.
        gathered = [g for g in gathered if g]
        examples = {name: np.concatenate([g[name] for g in gathered]) for name in gathered[0]}
    order = np.argsort(examples["example"])
    examples = {name: values[order] for name, values in examples.items()}
    count = examples["count"].sum()
    means = {n: float(v.sum() / count) for n, v in examples.items() if n not in ("example", "count", "bytes")}
    if unit == "token":
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
        if size := float(examples["bytes"].sum()):
            means["bits_per_byte"] = means["loss"] * float(count) / math.log(2) / size
        else:  # All that counts are control tokens: there is no text to measure by.
            del examples["bytes"]
    return Evaluation(means, examples)
