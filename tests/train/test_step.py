"""The optimizer step: what is not finite changes nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from minimind_ray.config.schema import ModelConfig, OptimConfig
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.train.optim import FlatGradients, build_adamw
from minimind_ray.train.step import NonFiniteError, StepResult, training_step

pytestmark = pytest.mark.unit


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(preset="tiny").shape(64))
    optimizer, gradients = build_adamw(model, OptimConfig()), FlatGradients(model)
    tokens = np.random.default_rng(0).integers(3, 64, 80).astype(np.uint16)
    pack = Pack(0, tokens, np.ones(80, np.uint8), np.array([50, 30], np.int32))
    # The number the last norm is multiplied by goes through everything.
    scale = dict(model.named_parameters())["model.norm.weight"]

    def step(number: int) -> StepResult:
        return training_step(
            model, CausalLM(model.shape), [pack], [batch_from_packs([pack])], optimizer, gradients,
            step=number, lr=1e-3, clip=1.0, device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip

    def numbers() -> list[torch.Tensor]:
        state = [value for each in optimizer.state.values() for value in each.values()]
        return [x.detach().clone() for x in (*model.parameters(), *state)]

    first = step(0)
    before, good = numbers(), scale[0].item()
    with torch.no_grad():
        scale[0] = math.nan
    with pytest.raises(NonFiniteError, match="step 1: loss nan"):
        step(1)
    with torch.no_grad():
        scale[0] = good
    assert all(map(torch.equal, numbers(), before)) and len(before) == 4 * len(list(model.parameters()))
    second = step(2)
    assert second.means["loss"] < first.means["loss"] and not torch.equal(numbers()[0], before[0])
