"""Low-rank adapters: as sft, but the base's weights stay as they are."""

from __future__ import annotations

from minimind_ray.config.stages import LORA
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.stage import Stage

STAGE = Stage(LORA, objective=lambda config, shape: CausalLM(shape))
