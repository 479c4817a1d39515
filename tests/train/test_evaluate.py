"""What is validated on, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minimind_ray.config.schema import ModelConfig
from minimind_ray.config.stages import DpoConfig
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.objectives.preference import REFERENCE, Preference
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


def test_the_examples_of_several_workers_keep_their_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker has some packs of a validation set of pairs, the last worker has none; every worker gets all rows."""
    lengths = np.array([6, 4, 5, 5], np.int32)  # Two pairs.
    packs = [
        Pack(i, np.arange(i, i + 20, dtype=np.uint16), np.ones(20, np.uint8), lengths, {
            CLUSTER: np.array([7 + i, 7 + i, 100, 100]),  # Prompt 100 is in all packs.
            REFERENCE: np.zeros(4, np.float32),
        })
        for i in range(5)
    ]  # fmt: skip
    model = Transformer(ModelConfig(preset="tiny").shape(64))

    def of(packs: list[Pack]) -> Evaluation:
        return evaluate(
            model, Preference(DpoConfig(), model.shape), packs, token_bytes_V=torch.ones(64, dtype=torch.int32),
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip

    whole, parts = of(packs), [of(packs[1::2]).examples, of(packs[::2]).examples, {}]

    def gather(gathered: list[dict[str, np.ndarray]], own: dict[str, np.ndarray]) -> None:
        assert own.keys() in (parts[0].keys(), set())
        gathered[:] = parts

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    for own in (packs[1::2], []):
        together = of(own)
        assert together.examples["cluster"].dtype == together.examples["example"].dtype == np.int64
        assert together.examples["cluster"].tolist() == [7, 100, 8, 100, 9, 100, 10, 100, 11, 100]
        for name, values in whole.examples.items():
            np.testing.assert_array_equal(together.examples[name], values)
        assert together.means == whole.means


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
