"""A model's own settings of generation: read, checked, written, and passed on to what is trained from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_ray.config.errors import UserError
from minimind_ray.config.load import load_config
from minimind_ray.config.schema import GenerationConfig
from minimind_ray.data.tokenizer import Tokenizer
from minimind_ray.model.checkpoint import save_model
from minimind_ray.model.generation import DEFAULTS, FILE, read_generation, write_generation
from minimind_ray.model.sampling import BOUNDS, Sampling
from minimind_ray.stages.base import base_at
from minimind_ray.stages.use import open_trained
from minimind_ray.stages.weights import Adapter, WholeModel
from tests.cli.conftest import random_model
from tests.jobs import make_tokenizer

pytestmark = pytest.mark.unit

PUBLISHED = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "eos_token_id": [1, 2],
    "pad_token_id": 0,
}


def write(directory: Path, content: Any) -> Path:
    (directory / FILE).write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t"))


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({}, {}),
        (PUBLISHED, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": False}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 3}, {"temperature": 0, "top_k": 3}),
        ({"max_new_tokens": 99, "top_p": None, "max_length": 20}, {"max_new_tokens": 99}),
    ],
)  # fmt: skip
def test_settings_are_read_by_their_names_in_transformers(
    content: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    assert read_generation(write(tmp_path, content)).given == settings


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    assert read_generation(tmp_path) == GenerationConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("temperature", True), ("top_p", 1.5), ("top_k", 2.5), ("top_k", -1),
     ("repetition_penalty", 0), ("max_new_tokens", 0)],
)  # fmt: skip
def test_an_impossible_setting_is_refused_with_the_files_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_generation(write(tmp_path, {key: value}))
    assert str(error.value).startswith(f"{tmp_path / FILE}: {key}: ")
    assert str(error.value).endswith(f"not {value!r}: correct it, or remove the line")


def test_the_config_and_sampling_have_the_same_bounds() -> None:
    assert list(GenerationConfig.model_fields) == list(BOUNDS)
    for name, (least, most) in BOUNDS.items():
        for value in (least, min(most, 10)):
            value = int(value) if name in ("top_k", "max_new_tokens") else value
            Sampling(**{name: value})
            assert GenerationConfig.model_validate({name: value}).given == {name: value}
        with pytest.raises(ValueError, match="greater than or equal|greater than 0"):
            GenerationConfig.model_validate({name: int(least) - 1})


@pytest.mark.parametrize(
    ("settings", "content"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"top_p": 0.5}, {"top_p": 0.5, "do_sample": True}),
        ({"temperature": 0, "top_p": 0.5, "max_new_tokens": 9}, {"do_sample": False, "max_new_tokens": 9}),
    ],
)
def test_settings_are_written_as_transformers_reads_them(
    settings: dict[str, Any], content: dict[str, Any], tmp_path: Path
) -> None:
    write_generation(tmp_path, GenerationConfig(**settings), {"eos_token_id": 2})
    assert json.loads((tmp_path / FILE).read_text()) == {"eos_token_id": 2, **content}
    read = {key: value for key, value in settings.items() if settings.get("temperature") != 0 or key != "top_p"}
    assert read_generation(tmp_path).given == read


@pytest.mark.slow
def test_transformers_generates_with_the_settings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = GenerationConfig(temperature=0.3, top_p=0.9, top_k=7, repetition_penalty=1.1, max_new_tokens=5)
    save_model(random_model(tokenizer, 0), tokenizer, tmp_path, generation=settings)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.do_sample
    assert {key: getattr(theirs.generation_config, key) for key in settings.given} == settings.given
    written = theirs.generate(torch.tensor([[tokenizer.bos_id]]))
    assert written.shape[1] <= 1 + 5
    write_generation(tmp_path, GenerationConfig(temperature=0, max_new_tokens=5))
    assert not AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.do_sample


@pytest.mark.slow
def test_a_run_passes_on_its_bases_settings_and_writes_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As in a run: what the config sets wins over the base's, for a whole model and for an adapter."""
    base, model = tmp_path / "base", random_model(tokenizer, 0)
    save_model(model, tokenizer, base, generation=GenerationConfig(temperature=0.3, top_k=5))
    plain, own = load_config("lora"), load_config("lora", overrides={"generation.temperature": 0.1})
    whole = WholeModel(model, tokenizer, base_at(base).generation.updated(own.generation))
    whole.snapshot()(tmp_path / "whole")
    assert open_trained(tmp_path / "whole").generation.given == {"temperature": 0.1, "top_k": 5}
    for config, settings in ((plain, {"temperature": 0.3, "top_k": 5}), (own, {"temperature": 0.1, "top_k": 5})):
        directory = tmp_path / f"adapter-{settings['temperature']}"
        Adapter(random_model(tokenizer, 0), config, base_at(base)).snapshot()(directory)
        assert (directory / FILE).exists() == (config is own)
        assert open_trained(directory).generation.given == settings
        assert open_trained(base, adapter=directory).generation.given == settings


@pytest.mark.slow
def test_what_is_given_wins_over_the_models_own_and_that_over_the_defaults(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(random_model(tokenizer, 0), tokenizer, tmp_path, generation=GenerationConfig(temperature=0.3, top_k=5))
    trained = open_trained(tmp_path)
    sampling = trained.sampling({"top_k": 9, "top_p": None}, max_new_tokens=77, seed=(4,))
    assert sampling == Sampling(0.3, DEFAULTS["top_p"], 9, 1.0, 77, seed=(4,))
    with pytest.raises(UserError, match="top-p is 2"):
        trained.sampling({"top_p": 2})
    (tmp_path / FILE).unlink()
    assert open_trained(tmp_path).sampling({}) == Sampling(0.8, 0.95, 0, 1.0, 256)
