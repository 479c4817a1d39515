"""Recipes in a plain process: what is done is skipped, what was interrupted goes on, what changed is done again."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from minimind_ray.cli.run import run_recipe
from minimind_ray.config.errors import UserError
from minimind_ray.stages.recipe import Recipe, read_recipe, stage_config
from minimind_ray.train.run import RunDirectory
from tests.jobs import rows_of, write_jsonl

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "model": {"preset": "tiny", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
    "data": {"max_seq_len": 64, "pack_tokens": 256, "val_fraction": 0.1},
    "batch": {"tokens": 512},
    "train": {"max_steps": 4, "precision": "float32"},
    "eval": {"samples": 0, "every": 2},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for stage in ("pretrain", "sft", "dpo"):
        write_jsonl(tmp_path / "data" / f"{stage}.jsonl", rows_of(stage, 200))
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "cache_dir": str(tmp_path / "cache")}}
    stages: list[dict[str, Any]] = [
        {"name": name, "settings": {"data": {"train": f"{name}.jsonl"}}} for name in ("pretrain", "sft", "dpo")
    ]
    stages[0]["settings"]["model"] = settings.pop("model")
    tokenizer = {"train": "pretrain.jsonl", "vocab_size": 400}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "tokenizer": tokenizer, "settings": settings, "stages": stages}))
    return path


def test_a_setting_of_adapters_is_for_the_stages_that_train_one(recipe: Path) -> None:
    content = read_recipe(recipe)
    of_all, own = ({"dpo.dpo.lora": True, key: 4} for key in ("lora.rank", "sft.lora.rank"))

    def ranks(overrides: dict[str, Any]) -> list[int]:
        return [stage_config(content, i, "out", None, "data", overrides).lora.rank for i in range(3)]

    assert ranks(of_all) == [8, 8, 4]
    assert ranks(own) == [8, 4, 8]  # which the stage itself refuses


def run(recipe: Path, capsys: pytest.CaptureFixture[str], **overrides: Any) -> str:
    keys = {key.replace("__", "."): value for key, value in overrides.items()}
    run_recipe(recipe, recipe.parent / "data", str(recipe.parent / "out"), keys, ray=False)
    return capsys.readouterr().out


def states(recipe: Path) -> list[str]:
    return [RunDirectory(recipe.parent / "out" / name).info()["state"] for name in ("pretrain", "sft", "dpo")]


def test_stages_follow_each_other_and_are_done_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(recipe, capsys).count("start: not started yet") == 3
    assert states(recipe) == ["finished"] * 3
    again = run(recipe, capsys)
    assert again.count("skip: finished, 4 steps, nothing changed") == 3
    assert "tokenizer" in again and "unchanged" in again

    # A changed setting redoes its stage and those that stand on it, and says why.
    changed = run(recipe, capsys, sft__optim__lr=1e-3)
    assert changed.count("skip:") == 1
    assert "redo: changed: optim.lr" in changed and "redo: changed: init_from (other content)" in changed
    assert (recipe.parent / "out" / "sft.before-1").is_dir()

    # So do changed data, those of the last stage alone.
    write_jsonl(recipe.parent / "data" / "dpo.jsonl", rows_of("dpo", 150, seed=1))
    changed = run(recipe, capsys, sft__optim__lr=1e-3)
    assert changed.count("skip:") == 2 and "redo: changed: data.train (other content)" in changed


def test_an_interrupted_stage_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe, capsys)
    whole = (recipe.parent / "out" / "sft" / "metrics.jsonl").read_text()
    sft = RunDirectory(recipe.parent / "out" / "sft")
    sft.update(state="running")  # as if the process had been killed after its checkpoint of step 2
    shutil.rmtree(sft.checkpoint_path("step-00000004"))
    sft.forget_after(2)
    out = run(recipe, capsys)
    assert "resume: its state is stopped (its process is gone), and it is not finished" in out
    lines = sft.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert len(whole.splitlines()) == 4
    assert states(recipe) == ["finished"] * 3
    assert out.count("skip:") == 2  # The same weights came out, so DPO's base has not changed.


def test_what_a_later_stage_lacks_is_found_before_the_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="nowhere is not a model"):
        run(recipe, capsys, dpo__init_from=str(recipe.parent / "nowhere"))
    (recipe.parent / "data" / "dpo.jsonl").unlink()
    with pytest.raises(UserError, match="data/dpo.jsonl: no such file"):
        run(recipe, capsys)
    assert not (recipe.parent / "out").exists()


def test_adapters_are_no_base(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = yaml.safe_load(recipe.read_text())
    tree["stages"][1:1] = [{**tree["stages"][2], "name": "first"}]
    tree["stages"][1] |= {"stage": "dpo"}
    parsed = Recipe.model_validate(tree)
    base = partial(stage_config, parsed, 2, "out", None, "data")
    assert base({}).init_from == "out/first"
    assert base({"first.dpo.lora": True}).init_from == "out/pretrain"
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="out/first is an adapter, not a whole model"):
        run(recipe, capsys, first__dpo__lora=True, sft__init_from=str(recipe.parent / "out" / "first"))


def test_overrides_name_a_key_or_a_stage_and_a_key(recipe: Path) -> None:
    parsed = read_recipe(recipe)

    def config(index: int, **overrides: Any) -> Any:
        keys = {key.replace("__", "."): value for key, value in overrides.items()}
        return stage_config(parsed, index, str(recipe.parent), None, recipe.parent, keys)

    assert config(2, dpo__beta=0.7).dpo.beta == 0.7
    assert config(2, dpo__dpo__beta=0.7).dpo.beta == 0.7
    assert config(1, dpo__optim__lr=0.5).optim.lr != 0.5 and config(2, dpo__optim__lr=0.5).optim.lr == 0.5
    assert config(1, optim__lr=0.5).optim.lr == 0.5
    with pytest.raises(UserError, match="nosuch"):
        config(1, sft__nosuch__key=1)
    with pytest.raises(UserError, match="pretrian.optim.lr is neither .* the stages of r are pretrain, sft, dpo"):
        config(1, pretrian__optim__lr=1)


def test_a_config_or_a_sweep_is_no_recipe(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for text, command in {"optim: {lr: 1}": "train STAGE --config", "axes: {}": "tune --sweep"}.items():
        file.write_text(text)
        with pytest.raises(UserError, match=f"not a recipe.*minimind-ray {command}"):
            read_recipe(file)
