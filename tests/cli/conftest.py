"""Models in every form that a command takes, tiny and untrained, and a way to call the command in this process."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minimind_ray.cli.main import run
from minimind_ray.config.load import load_config, to_yaml
from minimind_ray.config.schema import LoraConfig, ModelConfig
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import load_model, model_fingerprint, save_model
from minimind_ray.model.lora import adapters, add_lora, save_adapter
from minimind_ray.model.transformer import Transformer
from tests.jobs import make_tokenizer, rows_of, write_jsonl


@dataclass(frozen=True)
class Models:
    """`run` is a pretraining run whose only checkpoint is `base`; `adapter` is on `base`; `other` is another model."""

    tokenizer: Path
    run: Path
    base: Path
    other: Path
    adapter: Path


def random_model(tokenizer: Tokenizer, seed: int) -> Transformer:
    """Weights large enough that tokens differ in likelihood."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(preset="tiny").shape(tokenizer.vocab_size))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.load(make_tokenizer(root / "tokenizer"))
    run_dir, adapter = root / "run", root / "adapter"
    base = run_dir / "checkpoints" / "step-00000001"
    save_model(random_model(tokenizer, 0), tokenizer, base)
    (run_dir / "config.yaml").write_text(to_yaml(load_config("pretrain")))
    save_model(random_model(tokenizer, 1), tokenizer, root / "other")
    model = load_model(base)
    add_lora(model, LoraConfig(rank=4), seed=0)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(model, adapter, base, model_fingerprint(base))
    return Models(root / "tokenizer", run_dir, base, root / "other", adapter)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files pretrain.jsonl, sft.jsonl and dpo.jsonl of 40 rows, written a minute ago. Half the pairs are swapped, so
    that neither answer is always the shorter one."""
    root = tmp_path_factory.mktemp("rows")
    for stage in ("pretrain", "sft", "dpo"):
        content = rows_of(stage, 40)
        for row in content[::2] if stage == "dpo" else []:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        path = write_jsonl(root / f"{stage}.jsonl", content)
        os.utime(path, (time.time() - 60, time.time() - 60))
    return root


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`minimind-ray` with these arguments, and `stdin` as what is piped in."""

    def call(*args: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["minimind-ray", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code: object = 0
        try:
            run()
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert isinstance(code, int | None)
        return Outcome(code or 0, out, err)

    return call
