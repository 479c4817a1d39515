"""Supervised fine-tuning: cross-entropy on the assistant's turns. The documents' weights say which tokens those are."""

from __future__ import annotations

from minimind_ray.config.stages import SFT
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.stages.stage import Stage

STAGE = Stage(SFT, objective=lambda config, shape: CausalLM(shape))
