"""The pretrain stage: next-token prediction on plain text. It trains all weights on every token of every document."""

from __future__ import annotations

from minimind_ray.config.stages import PRETRAIN
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.stage import Stage

STAGE = Stage(PRETRAIN, objective=lambda config, shape: CausalLM(shape))
