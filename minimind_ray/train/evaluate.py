"""Compute an objective on a validation set: its value for every example, the means over all, and bits per byte.

Both the training loop (through `Validation`) and the `evaluate` stage call `evaluate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from minimind_ray.data.batch import batch_from_packs, passes
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.pack import Pack
from minimind_ray.data.store import PackStore
from minimind_ray.model.transformer import Transformer
from minimind_ray.train.step import Objective, autocast


@dataclass(frozen=True)
class Evaluation:
    """The result of a validation: means, and one row per example (a document or a pair).

    `examples` has one array per column, with rows in the order of `example`; float64, but ids are int64:

        example    the row's id. It is the same for every model, so two models can be compared row by row.
        cluster    the id of the row's cluster (see data/clusters.py)
        loss       summed over the example's counted items
        count      the number of these items
        bytes      bytes of text that the counted tokens stand for (only for losses per token)
        ...        the objective's metrics
    """

    means: dict[str, float]
    examples: dict[str, np.ndarray]

    def write(self, path: Path) -> None:
        """Write the examples as a Parquet file."""
        pq.write_table(pa.table(self.examples), path)


def packs_within(store: PackStore, max_tokens: int | None) -> int:
    """Return how many packs of a validation set to use, counted from the first, so as to stay within `max_tokens`."""
    if max_tokens is None:
        return store.n_packs
    return min(max(1, store.n_packs * max_tokens // store.n_tokens), store.n_packs)


def drop_stale(path: Path, loss: float, others: Sequence[Path] = ()) -> None:
    """Delete a file of `Evaluation.write` if its mean loss is not `loss`: it belongs to another checkpoint.

    Also delete the `others`, which are of the same checkpoint, if the file is missing or deleted.
    """
    try:
        table = pq.read_table(path)  # Raises FileNotFoundError if the file is missing.
        found = float(table["loss"].to_numpy().sum() / table["count"].to_numpy().sum())
    except (pa.ArrowException, OSError, KeyError):
        found = math.nan
    if not math.isclose(found, loss):
        for file in (path, *others):
            file.unlink(missing_ok=True)


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
    """Evaluate this worker's packs without dropout. Return the result of all workers, the same on every worker.

    Each forward pass takes packs of up to `pass_tokens` tokens in total, but at least one pack.

    For losses per token the means also have `perplexity` = exp(loss) and `bits_per_byte`: the loss in bits, divided by
    the bytes of text that the counted tokens stand for. Bits per byte allow comparing models with different tokenizers.
    `token_bytes_V` (int32) has each token's number of bytes, 0 for control tokens. If all counted tokens are control
    tokens, `bits_per_byte` and `bytes` are missing.
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
        per_example = (len(batch.bounds_D1) - 1) // len(values["loss"])  # Documents per example: 2 for a pair.
        ids = np.concatenate([(pack.id << 20) + np.arange(len(pack.lengths) // per_example) for pack in together])
        arrays = {name: value.double().cpu().numpy() for name, value in values.items()}
        clusters = np.concatenate([pack.columns[CLUSTER][::per_example] for pack in together])
        for name, array in {"example": ids, "cluster": clusters, **arrays}.items():
            columns.setdefault(name, []).append(array)
    model.train(was_training)
    return _evaluation({name: np.concatenate(parts) for name, parts in columns.items()}, objective.unit)


NO_MEANS = ("example", "cluster", "count", "bytes")


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
    means = {n: float(v.sum() / count) for n, v in examples.items() if n not in NO_MEANS}
    if unit == "token":
        means["perplexity"] = math.exp(min(means["loss"], 700.0))
        if size := float(examples["bytes"].sum()):
            means["bits_per_byte"] = means["loss"] * float(count) / math.log(2) / size
        else:  # All counted tokens are control tokens, which stand for no text.
            del examples["bytes"]
    return Evaluation(means, examples)
