"""What is validated on, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.train.evaluate import Evaluation, drop_stale, evaluate, packs_within

pytestmark = pytest.mark.unit

ONE = np.ones(1, np.int64)


def measure(token_bytes_V: torch.Tensor) -> Evaluation:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(preset="tiny").shape(64))
    pack = Pack(0, np.arange(20, dtype=np.uint16), np.ones(20, np.uint8), np.array([20], np.int32), {CLUSTER: ONE})
    return evaluate(
        model, CausalLM(model.shape), [pack],
        token_bytes_V=token_bytes_V, device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip


def test_control_tokens_alone_have_no_bits_per_byte() -> None:
    some, none = (measure(torch.full((64,), size, dtype=torch.int32)) for size in (1, 0))
    assert some.means.keys() - none.means.keys() == {"bits_per_byte"} and none.means["loss"] == some.means["loss"]
    assert some.examples.keys() - none.examples.keys() == {"bytes"}


@pytest.mark.parametrize("most, count", [(None, 10), (1, 1), (350, 3), (10**9, 10)])
def test_packs_within_a_number_of_tokens(most: int | None, count: int) -> None:
    store: Any = SimpleNamespace(n_packs=10, n_tokens=1000)
    assert packs_within(store, most) == count


def test_results_of_another_checkpoint_are_dropped(tmp_path: Path) -> None:
    file, evaluation = tmp_path / "validation.parquet", measure(torch.ones(64, dtype=torch.int32))
    drop_stale(file, 1.0)
    evaluation.write(file)
    drop_stale(file, evaluation.means["loss"])
    assert file.exists()
    for content in (file.read_bytes(), b"not Parquet"):
        file.write_bytes(content)
        drop_stale(file, evaluation.means["loss"] + 1e-3)
        assert not file.exists()
