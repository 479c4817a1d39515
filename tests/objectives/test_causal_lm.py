"""Next-token prediction against the plain form, where every token counts and where some do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimind_ray.config.schema import ModelConfig
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM

pytestmark = pytest.mark.unit

V, LENGTHS = 64, (90, 2, 41, 68)


@pytest.mark.parametrize("which", ["all", "answers", "one"])
def test_loss_and_gradient_are_those_of_cross_entropy_document_by_document(which: str) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(preset="tiny").shape(V))
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, V, sum(LENGTHS)).astype(np.uint16)
    weights = np.ones(len(tokens), np.uint8)
    if which == "answers":
        weights = (draw.random(len(tokens)) < 0.4).astype(np.uint8)
    elif which == "one":
        weights = (np.arange(len(tokens)) == 100).astype(np.uint8)
    weights[np.cumsum((0, *LENGTHS[:-1]))] = 0  # What nothing precedes is not predicted.
    pack = Pack(id=0, tokens=tokens, weights=weights, lengths=np.array(LENGTHS, np.int32))
    objective, batch = CausalLM(model.shape), batch_from_packs([pack])

    loss, _ = objective(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    examples = objective.examples(model, batch)

    losses, counts = [], []
    for ids, weight in zip(np.split(tokens, np.cumsum(LENGTHS)[:-1]), np.split(weights, np.cumsum(LENGTHS)[:-1])):
        ids, weight_N = torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(weight[1:].astype(np.float32))
        hidden_NC = model(ids[:-1], torch.tensor([0, len(ids) - 1], dtype=torch.int32))
        losses.append((F.cross_entropy(model.project(hidden_NC), ids[1:], reduction="none") * weight_N).sum())
        counts.append(weight_N.sum())
    torch.testing.assert_close(examples["loss"], torch.stack(losses), rtol=1e-5, atol=1e-5)
    assert torch.equal(examples["count"], torch.stack(counts)) and objective.count(pack) == sum(counts)
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-5, atol=1e-5)
    for ours, plain in zip(gradients, torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
