"""The options that commands take from the schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from minimind_ray.cli.flags import config_from_flags, search_options
from minimind_ray.config.flags import config_flags, overrides_of
from minimind_ray.config.search import SearchConfig
from minimind_ray.config.stages import STAGES
from tests.cli.conftest import Command

pytestmark = pytest.mark.unit

FLAGS = {
    "train": "--batch-tokens --beta --config --cpus-per-worker --dry-run --epochs --gpus-per-worker --help --init-from "
    "--loss --lr --max-seq-len --max-steps --no-ray --out --pack-tokens --precision --preset --rank --ray --resume "
    "--schedule --seed --set --tokenizer --train --val --wandb --warmup --workers",
    "tune": "--axis --batch-tokens --beta --budget-hours --budget-tokens --concurrent --config --cpus-per-worker "
    "--dry-run --epochs --fuse --gpus-per-trial --help --init-from --loss --lr --margin --max-seq-len --max-steps "
    "--metric --mode --out --pack-tokens --points --precision --preset --price-per-hour --rank --resume --schedule "
    "--scheduler --searcher --seed --seeds --set --sweep --tokenizer --train --trials --val --wandb --warmup --workers",
    "compare": "--chat --csv --help --json --limit --margin --metric --mode --num-fewshot --out --task-path --tasks",
    "report": "--help --margin --out --port --watch",
    "diagnose": "--help --json --lang",
    "run": "--data-dir --download --help --no-ray --out --ray --set --workers",
    "data prepare": "--cache-dir --help --max-seq-len --no-ray --pack-tokens --ray --set --stage --tokenizer --val",
    "data inspect": "--help --max-seq-len --pack-tokens --rows --samples --set --stage --tokenizer",
    "eval": "--adapter --chat --config --help --json --limit --max-seq-len --num-fewshot --out --pack-tokens "
    "--precision --reference --set --stage --task-path --tasks",
}


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_the_flags_that_users_rely_on(command: Command, name: str) -> None:
    said = command(*name.split(), "--help")
    lines = (line[:40] for line in said.out.splitlines() if re.match(r"│ [* ] *--|│ --", line))
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(lines)))) == FLAGS[name].split()


@pytest.mark.parametrize(
    "name", ["train", "tune", "eval", "data prepare", "data inspect", "verify resume", "config show"]
)
def test_help_names_the_stages_of_the_table(command: Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "parrot", STAGES["sft"])
    said = " ".join(command(*name.split(), "--help").out.replace("│", " ").split())
    assert "pretrain, sft, lora, dpo or parrot" in said
    assert "{stages}" not in said


def test_a_flag_sets_its_key(command: Command, tmp_path: Path) -> None:
    """Given to the command, read as YAML but for paths, and stronger than --set."""
    flags = {
        "train": ["a.jsonl", "[b.jsonl, c.jsonl]", "[ab]*.jsonl"], "val": ["v"], "tokenizer": "1e3", "lr": "1e-3",
        "warmup": None, "max_steps": "null", "workers": "2:8", "out": "007",
    }  # fmt: skip
    assert overrides_of(flags) == {
        "data.train": ["a.jsonl", "b.jsonl", "c.jsonl", "[ab]*.jsonl"], "data.val": "v", "data.tokenizer": "1e3",
        "optim.lr": 1e-3, "train.max_steps": None, "scale.workers": "2:8", "out": "007",
    }  # fmt: skip
    assert config_from_flags("sft", [], ["optim.lr=1", "optim.clip=2"], {"lr": "0.5", "stage": "dpo"}).optim.lr == 0.5
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({"optim": {"lr": 0.25}}))
    said = command("train", "sft", "--dry-run", "--config", file, "--lr", "-1")
    assert (
        said.code == 1
        and said.err == "error: optim.lr (from the command line): input should be greater than 0, not -1\n"
    )


def test_every_flag_has_a_name_of_its_own_and_every_search_field_an_option() -> None:
    assert len({found.key for found in config_flags().values()}) == len(config_flags()) == 24
    options = {option.parameter: option for option in search_options()}
    assert list(options) == list(SearchConfig.model_fields)
    assert all(option.help for option in options.values() if option.parameter != "price_per_hour")
    assert [options[name].kind for name in ("trials", "budget_hours", "fuse", "mode")] == [int, float, str, str]
