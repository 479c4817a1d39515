"""Our model class for lm-eval against lm-eval's own `hf`, on the same directory: the same numbers to the last item."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate

from minimind_ray.config.schema import ModelShape
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, save_model
from minimind_ray.model.generation import read_generation
from minimind_ray.model.transformer import Transformer
from minimind_ray.tasks.lm import RaggedLM
from minimind_ray.tasks.suite import FEWSHOT_SEED, load_tasks
from tests.data.chat_families import write_family
from tests.jobs import make_tokenizer

pytestmark = pytest.mark.slow

LOCAL = Path(__file__).parent / "local"
KINDS = ["my_choice", "my_letters", "my_words", "my_texts"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows most answers of my_words by heart. It has so few positions that contexts are cut, and texts
    are read in windows."""
    root = tmp_path_factory.mktemp("task-model")
    tokenizer = Tokenizer.load(make_tokenizer(root / "tokenizer"))
    model = random_model(tokenizer.vocab_size)
    rows = [json.loads(line) for line in (LOCAL / "data" / "words.jsonl").read_text("utf-8").splitlines()]
    texts = tokenizer.encode([f"{row['question']} {row['answer']}."[-40:] for row in rows])
    tokens_N = torch.tensor([token for ids in texts for token in ids])
    bounds_D1 = torch.tensor([0, *map(len, texts)]).cumsum(0).to(torch.int32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        torch.nn.functional.cross_entropy(model.project(model(tokens_N, bounds_D1))[:-1], tokens_N[1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, tokenizer, root / "model")
    return root / "model"


def random_model(vocab_size: int) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        ModelShape(
            vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, max_position_embeddings=96,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def ours(folder: Path) -> RaggedLM:
    model, tokenizer = load_model(folder).eval(), Tokenizer.load(folder)
    return RaggedLM(model, tokenizer, read_generation(folder), nullcontext)


def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def samples_of(lm: Any, task: str, **options: Any) -> list[dict[str, Any]]:
    parts = load_tasks([task], LOCAL).parts[task]
    parts[0].set_fewshot_seed(FEWSHOT_SEED)
    found: Any = evaluate(lm, {"tasks": {task: parts[0]}, "groups": {}}, bootstrap_iters=0, **options)
    return found["samples"][task]


def assert_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one["arguments"] == other["arguments"]
        for mine, expected in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
            if isinstance(expected, str):
                assert mine == expected
            else:
                assert mine == pytest.approx(expected, abs=2e-4)
        for metric in other["metrics"]:
            assert one[metric] == pytest.approx(other[metric], abs=2e-4)


@pytest.mark.parametrize("task", KINDS)
def test_every_item_is_as_with_hf(saved: Path, task: str) -> None:
    found = samples_of(ours(saved), task)
    assert_same(found, samples_of(theirs(saved), task))
    if task != "my_texts":
        metric = found[0]["metrics"][0]
        assert 0 < sum(sample[metric] for sample in found) < len(found)


def test_conversations_are_as_with_hf(saved: Path) -> None:
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    for task in ("my_choice", "my_words"):
        assert_same(samples_of(ours(saved), task, **options), samples_of(theirs(saved), task, **options))


@pytest.mark.parametrize("kind", ["bytes", "first"])
def test_start_tokens_are_as_with_hf(tmp_path: Path, kind: str) -> None:
    """With a tokenizer that begins each text with its start token, as Llama's does."""
    folder = write_family(tmp_path / "tokenizer", "llama3", kind)
    path = folder / "tokenizer.json"
    layout = json.loads(path.read_text("utf-8"))
    bos = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["bos_token"]
    id = next(token["id"] for token in layout["added_tokens"] if token["content"] == bos)
    start, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    layout["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, text], "pair": [start, text, text],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }  # fmt: skip
    path.write_text(json.dumps(layout), "utf-8")
    tokenizer = Tokenizer.load(folder)
    save_model(random_model(tokenizer.vocab_size), tokenizer, tmp_path / "model")
    lm, hf = ours(tmp_path / "model"), theirs(tmp_path / "model")
    for text in ("hello", f"{bos}hello"):
        assert lm.tok_encode(text) == hf.tok_encode(text)
        assert lm.tok_encode(text).count(id) == 1
    for task in ("my_letters", "my_words", "my_texts"):
        assert_same(samples_of(lm, task), samples_of(hf, task))
