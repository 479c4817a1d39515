"""Facts about prepared data, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from minimind_ray.data.baselines import baselines
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from tests.jobs import make_job, start

pytestmark = pytest.mark.unit


def test_baselines_of_a_job_are_those_of_its_tokens(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=200)
    assert isinstance(job.train, str) and job.val
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    counted = [
        [token for pack in PackStore(path) for token, weight in zip(pack.tokens, pack.weights) if weight]
        for path in (job.train, job.val)
    ]
    seen, scored = Counter(counted[0]), counted[1]
    size = tokenizer.vocab_size
    loss = -sum(math.log((seen[token] + 1) / (len(counted[0]) + size)) for token in scored) / len(scored)
    found = job.baselines
    assert found["uniform"] == math.log(size) and found["unigram"] == pytest.approx(loss)
    assert found["unigram"] < found["uniform"] and found["unknown"] == 0
    assert 1 < found["bytes_per_token"] < 20
    assert found["val"]["documents"] == PackStore(job.val).n_documents
    assert json.loads((start(job) / "run.json").read_text())["baselines"] == found


def test_without_training_packs_there_is_no_unigram_loss(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows=200)
    found = baselines(None, job.val, Tokenizer.load(tmp_path / "tokenizer"))
    assert found["unigram"] is None and "train" not in found and found["bytes_per_token"] > 1
