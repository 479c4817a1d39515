"""The stages by name."""

from __future__ import annotations

from collections.abc import Callable

from minimind_ray.config.schema import Config, StageName
from minimind_ray.data.plan import TrainingData
from minimind_ray.stages.dpo import dpo
from minimind_ray.stages.lora import lora
from minimind_ray.stages.pretrain import pretrain
from minimind_ray.stages.sft import sft
from minimind_ray.train.context import Context

STAGES: dict[StageName, Callable[[Config, Context, TrainingData], None]] = {
    "pretrain": pretrain,
    "sft": sft,
    "lora": lora,
    "dpo": dpo,
}
