"""The table of stages: the names of stages, and what other parts of the program read from a stage's record."""

from __future__ import annotations

import pytest

from minimind_ray.config.flags import movable_keys
from minimind_ray.config.load import config_keys
from minimind_ray.config.schema import own_sections
from minimind_ray.config.section import Section
from minimind_ray.config.stages import CLUSTERS, DPO, STAGES, StageRecord
from minimind_ray.display.progress import validation_line
from minimind_ray.stages.stage import find_stage

pytestmark = pytest.mark.unit


def test_every_stage_is_in_the_file_of_its_name() -> None:
    for name, record in STAGES.items():
        assert record.name == name and find_stage(name).record is record
        assert record.judged_by in record.metrics and record.rows in CLUSTERS


@pytest.mark.parametrize("name", ["run", "plan", "use", "base"])
def test_a_stage_cannot_have_the_name_of_another_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, name, StageRecord(name=name, rows="text"))
    with pytest.raises(AssertionError, match=f"stages/{name}.py has no STAGE"):
        find_stage(name)


def test_a_stage_cannot_have_the_name_of_another_config_key() -> None:
    with pytest.raises(AssertionError, match="section of stage optim would replace config key optim"):
        own_sections([StageRecord(name="optim", rows="text", section=Section)])


def test_pbt_moves_the_marked_keys() -> None:
    assert set(movable_keys()) == {
        "optim.lr", "optim.weight_decay", "optim.clip", "optim.beta1", "optim.beta2", "lora.dropout",
        "dpo.beta", "dpo.label_smoothing", "dpo.simpo_gamma",
    }  # fmt: skip
    assert set(movable_keys()) <= set(config_keys())


def test_the_progress_line_has_the_metrics_of_the_record() -> None:
    timing = {"tokens_per_second": 1.0, "mfu": 0.1, "seconds_left": 1.0}
    metrics = {"step": 1, "loss": 1.0, "lr": 0.1, "timing": timing, "val/loss": 2.0, "val/odd": 3.0, "val/margin": 4.0}
    record = StageRecord(name="toy", rows="text", metrics={"val/odd": "max", "val/loss": "min"}, judged_by="val/odd")
    assert validation_line(metrics, 2, record).endswith("| validation: loss 2  odd 3")
    assert validation_line(metrics, 2, DPO).endswith("| validation: loss 2  margin 4")
