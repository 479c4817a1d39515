"""train --dry-run: the numbers are those of the run, nothing is written and Ray is not even imported."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from minimind_ray.cli.flags import config_from_flags
from minimind_ray.cli.plan import counted
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import DataConfig, LoraConfig, ModelConfig
from minimind_ray.data import estimate as module
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.estimate import estimate
from minimind_ray.data.pack import Pack
from minimind_ray.data.shipped import resolve_paths
from minimind_ray.data.store import PackStore
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.lora import add_lora
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.run import prepare_job
from minimind_ray.train.footprint import footprint
from minimind_ray.train.step import autocast
from tests.cli.conftest import Command, Models
from tests.jobs import rows_of

pytestmark = pytest.mark.slow

VOCABULARY = 382


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 pack"), (0, "0 packs"), (2000, "2,000 packs"), (1.0, "1 pack"), (0.5, "0.5 packs")]
)
def test_a_count_has_the_number_of_its_noun(count: float, text: str) -> None:
    assert counted(count, "pack") == text


SIZES = {"data.max_seq_len": 64, "data.pack_tokens": 256, "batch.tokens": 1024, "data.val_fraction": 0.2}


def arguments(stage: str, rows: Path, models: Models, cache: Path) -> list[object]:
    settings = {**SIZES, "data.cache_dir": cache, "model.preset": "tiny"}
    base = ["--tokenizer", models.tokenizer] if stage == "pretrain" else ["--init-from", models.run]
    file = rows / f"{'sft' if stage == 'lora' else stage}.jsonl"
    sets = [arg for key, value in settings.items() for arg in ("--set", f"{key}={value}")]
    return ["train", stage, "--dry-run", "--train", file, *base, *sets]


def numbers(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text)]


def lines_of(out: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora", "dpo"])
def test_the_plan_is_what_the_run_finds(
    command: Command, models: Models, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.load(models.tokenizer).vocab_size == VOCABULARY
    args = arguments(stage, rows, models, tmp_path / "cache")
    guess = command(*args)
    assert guess.code == 0, guess.err
    assert list(tmp_path.iterdir()) == []
    guessed = lines_of(guess.out)
    assert "estimated from 40 of about 40 rows" in guessed["data"]

    flags = {"--train": "data.train", "--tokenizer": "data.tokenizer", "--init-from": "init_from"}
    given = {flags[str(a)]: str(b) for a, b in zip(args, args[1:]) if str(a) in flags}
    overrides = {**SIZES, **given, "data.cache_dir": str(tmp_path / "cache"), "model.preset": "tiny"}
    job = prepare_job(resolve_paths(load_config(stage, overrides=overrides)))
    store = PackStore(str(job.train))

    known = lines_of(command(*args).out)
    assert "exact" in known["data"]
    counted = store.manifest.total("counted_tokens")
    assert numbers(known["data"])[:4] == [store.n_tokens, store.n_documents, counted, store.n_packs]
    assert numbers(known["steps"])[0] == job.plan.steps
    assert numbers(guessed["data"])[0] == pytest.approx(store.n_tokens, rel=0.25)
    total = sum(p.numel() for p in Transformer(ModelConfig(preset="tiny").shape(VOCABULARY)).parameters())
    assert numbers(guessed["model"].split(",", 1)[1])[0] == total
    assert ("are trained" in guessed["model"]) == (stage == "lora")
    assert ("reference" in guessed) == (stage == "dpo")


def test_ray_is_not_imported(models: Models, rows: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from minimind_ray.cli.main import app; app(standalone_mode=False); assert 'ray' not in sys.modules"
    )
    args = arguments("pretrain", rows, models, tmp_path / "cache")
    subprocess.run([sys.executable, "-c", code, *map(str, args)], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_sample_stands_for_the_whole(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A part of the rows is read, and the whole is known to some percent; of compressed files it looks a bit less."""
    monkeypatch.setattr(module, "SAMPLE_BYTES", 150_000)
    within = 0.2 if suffix.endswith(("gz", "zst")) else 0.05
    texts = [row["text"] for row in rows_of("pretrain", 3000)]
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    for part in range(3):
        path = tmp_path / f"{part}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": texts}), path)
        else:
            compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}
            path.write_bytes(compress[suffix](content))
    tokenizer = Tokenizer.load(models.tokenizer)
    config = DataConfig(train=str(tmp_path), val_fraction=0.0, max_seq_len=64, pack_tokens=256)
    found = estimate("pretrain", config, tokenizer)
    lengths = [len(ids) + 2 for ids in tokenizer.encode(texts)]
    assert found.sampled < 3000
    assert found.rows == pytest.approx(9000, rel=within)
    # Of a text that is split each part begins with the last token of the part before.
    assert found.tokens == pytest.approx(3 * sum(lengths), rel=within)
    assert found.counted == pytest.approx(3 * (sum(lengths) - 3000), rel=within)
    assert found.packs == pytest.approx(found.tokens / 256, rel=0.1)
    half = DataConfig(train=str(tmp_path), val_fraction=0.5, max_seq_len=64, pack_tokens=256)
    assert estimate("pretrain", half, tokenizer).tokens == pytest.approx(found.tokens / 2, abs=1)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_activations_are_what_a_forward_pass_keeps(dtype: torch.dtype, adapters: bool) -> None:
    """Against the bytes kept for backward by a whole pack through the whole model."""
    shape = ModelConfig(preset="tiny", num_hidden_layers=5).shape(VOCABULARY)

    def adapt(model: torch.nn.Module) -> None:
        if adapters:
            add_lora(model, LoraConfig(rank=4), seed=0)

    model = Transformer(shape)
    adapt(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    lengths = np.full(40, 100, np.int32)
    batch = batch_from_packs([Pack(0, np.arange(4000, dtype=np.uint16) % 300, np.ones(4000, np.uint8), lengths)])
    with autocast(torch.device("cpu"), dtype), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = CausalLM(shape)(model, batch)
    found = footprint(shape, adapt, pack_tokens=4000, document=100, counted=1.0, dtype=dtype)
    assert loss.requires_grad and found.activations == pytest.approx(sum(kept.values()), rel=0.02)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.trainable, found.gradients, found.optimizer) == (trainable, 4 * trainable, 8 * trainable)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters())


BAD = [
    (["--train", "/nowhere"], "/nowhere: no such file"),
    (["--batch-tokens", "1000"], "batch.tokens 1000 is not a multiple"),
    (["--set", "lr=1"], "no such setting; did you mean optim.lr?"),
    (["--tokenizer", "/nowhere"], "this is not a tokenizer directory"),
    (["--set", "model.num_attention_heads=3"], "model.num_attention_heads"),
    (["--set", "model.num_key_value_heads=3"], "model.num_key_value_heads 3"),
    (["--set", "data.cache=false"], "train.max_steps is not set"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_sentence(
    command: Command, models: Models, rows: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    outcome = command(*arguments("pretrain", rows, models, tmp_path / "cache"), *args)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err


def test_rows_that_would_stop_the_run_are_told(command: Command, models: Models, rows: Path, tmp_path: Path) -> None:
    args = arguments("pretrain", rows, models, tmp_path / "cache")
    bad = tmp_path / "bad.jsonl"
    bad.write_text((rows / "pretrain.jsonl").read_text("utf-8") + "{}\n" * 10, encoding="utf-8")
    args[args.index("--train") + 1] = bad
    told = lines_of(command(*args).out)["rejected"]
    assert f"10 of 50 sampled rows, such as {bad}:41: text is missing" in told and "the run would stop" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("long.jsonl", b'{"text": "' + b"x" * 2**24 + b'"}\n', "long.jsonl:1: "),
        ("bad.parquet", b"PAR1PAR1", "bad.parquet"),
    ],
)
def test_files_with_nothing_to_use(
    command: Command, models: Models, rows: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    given = arguments("pretrain", rows, models, tmp_path / "cache")
    given[given.index("--train") + 1] = tmp_path / name
    outcome = command(*given)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1 and message in outcome.err


def test_paths_are_taken_as_they_are_and_sources_together() -> None:
    train = ["data #1/a.jsonl", "[b.jsonl, c.jsonl]", "[de]*.jsonl"]
    config = config_from_flags("pretrain", [], [], {"train": train, "val": ["v.jsonl"], "out": "1e5", "lr": "1e-4"})
    assert config.data.train == ["data #1/a.jsonl", "b.jsonl", "c.jsonl", "[de]*.jsonl"]
    assert (config.data.val, config.out, config.optim.lr) == ("v.jsonl", "1e5", 1e-4)
