"""What a user reads when a run cannot be resumed as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minimind_ray.config.load import load_config, read_yaml, to_yaml
from minimind_ray.config.reading import dump_yaml
from minimind_ray.config.schema import Config
from minimind_ray.train.resume import differences, longer, refusal

pytestmark = pytest.mark.unit

WHERE = "/runs/my run"


def config_of(stage: str = "sft", **overrides: Any) -> Config:
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(stage, overrides={"out": WHERE, "train.max_steps": 4, **given})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config_of()), encoding="utf-8")
    return path


def test_settings_that_teach_nothing_may_change(file: Path) -> None:
    assert refusal(WHERE, file, config_of(scale__workers=3, eval__every=7, track__wandb="off")) is None
    assert differences(file, config_of(optim__lr=1.0, scale__workers=3)) == {"optim.lr": (1e-5, 1.0)}


def test_a_run_of_a_version_without_a_section_can_be_resumed(file: Path) -> None:
    tree = read_yaml(file)
    del tree["generation"]
    file.write_text(dump_yaml(tree), encoding="utf-8")
    assert refusal(WHERE, file, config_of()) is None
    assert differences(file, config_of(generation__top_k=5)) == {"generation.top_k": (None, 5)}


def test_a_few_differences_are_shown_with_both_values_and_many_by_name(file: Path) -> None:
    own = f"minimind-ray train sft --config {file} --resume; for other settings choose another --out"
    assert refusal(WHERE, file, config_of(optim__lr=1.0, data__train="a" * 70)) == (
        f"{WHERE} cannot be resumed with other settings: data.train {'a' * 60}… (the run has unset), optim.lr 1.0 "
        f"(the run has 1e-05). To continue with its own settings: {own}"
    )
    many = refusal(WHERE, file, config_of("pretrain", optim__clip=2.0, train__seed=1))
    assert f"other settings: optim.clip, optim.lr, stage, train.seed. To continue with its own settings: {own}" in str(
        many
    )


def test_the_command_leads_to_a_run_that_was_moved(file: Path) -> None:
    said = str(refusal("/elsewhere/run", file, config_of(optim__lr=1.0)))
    assert f"train sft --config {file} --out /elsewhere/run --resume" in said


def test_a_longer_run_is_a_new_one(file: Path) -> None:
    said = str(refusal(WHERE, file, config_of(train__max_steps=8)))
    assert "train.max_steps 8 (the run has 4)" in said and f"--config {file} --resume. The learning rate" in said
    assert said.endswith(
        f"start a new run from its result: minimind-ray train sft --config {file} --out '{WHERE}-longer' "
        f"--init-from '{WHERE}' --set train.max_steps=8"
    )
    assert longer(WHERE, file, config_of()).endswith("--set train.max_steps=N")
    # An adapter is no base for another run.
    assert "--init-from" not in longer(WHERE, file, config_of("lora"))


def test_a_job_gets_no_command_that_names_a_file_it_does_not_have(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    said = str(refusal(WHERE, file, config_of(train__max_steps=8)))
    assert said.endswith("use the values in its config.yaml, or choose another --out")
    assert longer(WHERE, file, config_of()).endswith("start a new run with another --out")
