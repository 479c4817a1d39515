"""Packs that go through the model together: the same training and validation, in fewer passes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind_ray.config.stages import DpoConfig
from minimind_ray.data.batch import batch_from_packs, passes
from minimind_ray.data.clusters import CLUSTER
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.objectives.preference import REFERENCE, Preference
from minimind_ray.stages.run import run_here
from minimind_ray.train.context import deterministic
from minimind_ray.train.evaluate import evaluate
from minimind_ray.train.prefetch import ahead
from minimind_ray.train.run import RunDirectory
from tests.jobs import make_job, start

pytestmark = pytest.mark.slow


def pack(number: int, *lengths: int) -> Pack:
    random = np.random.default_rng(number)
    tokens = random.integers(3, 300, sum(lengths)).astype(np.uint16)
    return Pack(number, tokens, np.ones(len(tokens), np.uint8), np.array(lengths, np.int32))


def test_as_many_as_fit_but_one_at_least() -> None:
    packs = [pack(0, 5, 4), pack(1, 3), pack(2, 30), pack(3, 6), pack(4, 6)]
    for tokens, expected in [(0, [[0], [1], [2], [3], [4]]), (12, [[0, 1], [2], [3, 4]]), (60, [[0, 1, 2, 3, 4]])]:
        assert [[p.id for p in together] for together in passes(packs, tokens)] == expected
    assert list(passes([], 12)) == []


def test_a_batch_is_inputs_and_their_next_tokens() -> None:
    """Document by document, the last token no input and the first no target."""
    packs = [pack(0, 5, 1, 4), pack(1, 3)]
    batch = batch_from_packs(packs)
    documents = [d for p in packs for d in np.split(p.tokens.astype(np.int64), np.cumsum(p.lengths)[:-1])]
    assert batch.tokens_N.tolist() == [token for d in documents for token in d[:-1]]
    assert batch.targets_N.tolist() == [token for d in documents for token in d[1:]]
    assert batch.bounds_D1.tolist() == [0, 4, 4, 7, 9]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_run_in_fewer_passes_is_the_same(stage: str, tmp_path: Path) -> None:
    origin = {}
    if stage == "sft":
        base = make_job(tmp_path, train__max_steps=1, out=str(tmp_path / "base"))
        start(base)
        run_here(base)
        origin = {"init_from": str(tmp_path / "base")}
    losses = []
    for tokens in ("auto", 700):
        job = make_job(
            tmp_path, stage, train__max_steps=4, batch__pass_tokens=tokens, out=str(tmp_path / str(tokens)), **origin
        )
        start(job)
        run_here(job)
        losses.append([line["loss"] for line in RunDirectory(job.config.out).metrics()])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_validation_in_one_pass_is_the_same(stage: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, train__max_steps=1)
    torch.manual_seed(0)
    shape = job.config.model.shape(400)
    model = Transformer(shape)
    objective = CausalLM(shape) if stage == "pretrain" else Preference(DpoConfig(), shape)
    packs = [pack(0, 20, 9, 30, 8), pack(1, 40, 12), pack(2, 7, 7)]
    columns = [REFERENCE, CLUSTER] if stage == "dpo" else [CLUSTER]
    packs = [dataclasses.replace(p, columns={c: np.zeros(len(p.lengths), c.dtype) for c in columns}) for p in packs]
    found = []
    for tokens in (0, 120, 1000):
        found.append(
            evaluate(
                model, objective, packs, token_bytes_V=torch.ones(400, dtype=torch.int32),
                device=torch.device("cpu"), dtype=torch.float32, pass_tokens=tokens,
            )
        )  # fmt: skip
    for other in found[1:]:
        assert other.means == pytest.approx(found[0].means, rel=1e-5)
        assert other.examples["example"].tolist() == found[0].examples["example"].tolist()
        np.testing.assert_allclose(other.examples["loss"], found[0].examples["loss"], rtol=1e-4)


def test_a_run_may_go_on_in_smaller_passes(tmp_path: Path) -> None:
    """As on a GPU with less memory."""
    start(make_job(tmp_path, batch__pass_tokens=1024))
    start(make_job(tmp_path, batch__pass_tokens=256), resume=True)


def test_ahead_gives_what_comes_and_raises_what_was_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("gone")

    given = ahead(items())
    assert [next(given), next(given)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(given)
    assert list(ahead(iter([]))) == []


def test_who_stops_does_not_wait_for_what_comes_next() -> None:
    free = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        free.wait(20)
        yield 2

    began = time.monotonic()
    given = ahead(items())
    assert next(given) == 1
    given.close()
    assert time.monotonic() - began < 10
    free.set()


def test_deterministic_is_put_back() -> None:
    for before in (False, True):
        torch.use_deterministic_algorithms(before)
        try:
            with pytest.raises(OSError), deterministic(True):
                assert torch.are_deterministic_algorithms_enabled()
                raise OSError
            assert torch.are_deterministic_algorithms_enabled() is before
            with deterministic(False):
                assert torch.are_deterministic_algorithms_enabled() is before
        finally:
            torch.use_deterministic_algorithms(False)
