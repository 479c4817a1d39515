"""The lora stage: supervised fine-tuning as in sft, but it trains only low-rank adapters; the base stays frozen."""

from __future__ import annotations

from minimind_ray.config.stages import LORA
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.stage import Stage

STAGE = Stage(LORA, objective=lambda config, shape: CausalLM(shape))
