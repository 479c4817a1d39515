"""The sft stage: supervised fine-tuning. The loss counts only the tokens of the assistant's turns, by their weights."""

from __future__ import annotations

from minimind_ray.config.stages import SFT
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.stage import Stage

STAGE = Stage(SFT, objective=lambda config, shape: CausalLM(shape))
