"""What a worker's memory holds while training: weights, gradients, optimizer state, and what backward needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from minimind_ray.config.schema import Config, ModelShape
from minimind_ray.data.batch import batch_from_packs
from minimind_ray.data.pack import Pack
from minimind_ray.model.transformer import Transformer
from minimind_ray.objectives.causal_lm import CausalLM
from minimind_ray.train.step import autocast

PROBE_TOKENS = 512
GPU_PASS = 2**17


@dataclass(frozen=True)
class Footprint:
    """Bytes on a worker, and the parameters that are trained. Frozen weights have neither gradients nor state."""

    trainable: int
    weights: int
    activations: int

    @property
    def gradients(self) -> int:
        """One float32 each."""
        return 4 * self.trainable

    @property
    def optimizer(self) -> int:
        """AdamW's two moments, float32."""
        return 8 * self.trainable

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def footprint(
    shape: ModelShape,
    adapt: Callable[[Transformer], None],
    *,
    pack_tokens: int,
    document: float,
    counted: float,
    dtype: torch.dtype,
) -> Footprint:
    """Of a model of `shape` once `adapt` has put its adapters on it, trained on packs of `pack_tokens`.

    `document` is a usual document's length in tokens, `counted` the part of tokens that carry loss. Activations are an
    estimate: what a forward pass keeps for backward is measured here with one layer and two, on packs of two sizes, and
    taken to grow linearly with both.
    """
    with torch.device("meta"):
        model = Transformer(shape)
    adapt(model)
    parameters = list(model.parameters())
    length = max(2, min(round(document), PROBE_TOKENS))
    few = max(1, PROBE_TOKENS // length)

    def kept(documents: int) -> int:
        one, two = (_kept(shape, adapt, layers, length, documents, counted, dtype) for layers in (1, 2))
        return one + (two - one) * (shape.num_hidden_layers - 1)

    # Not all of it grows with the tokens: weights cast to bfloat16 are kept too.
    per_document = (kept(2 * few) - kept(few)) / few
    return Footprint(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=4 * sum(p.numel() for p in parameters),
        activations=round(kept(few) + per_document * (pack_tokens / length - few)),
    )


def _kept(
    shape: ModelShape,
    adapt: Callable[[Transformer], None],
    layers: int,
    length: int,
    documents: int,
    counted: float,
    dtype: torch.dtype,
) -> int:
    """Bytes that the forward pass of a model with so many layers keeps, its parameters not among them."""
    with torch.device("meta"):
        model = Transformer(shape.model_copy(update={"num_hidden_layers": layers}))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(tensor.data)
    adapt(model)
    return kept_for_backward(model, length, documents, counted, dtype)


def kept_for_backward(model: Transformer, length: int, documents: int, counted: float, dtype: torch.dtype) -> int:
    """Bytes that a forward pass over documents of `length` keeps, the model's parameters not among them."""
    device = next(model.parameters()).device
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = length * documents
    weights = np.zeros(tokens, np.uint8)
    weights[: round(counted * tokens)] = 1
    lengths = np.full(documents, length, np.int32)
    batch = batch_from_packs([Pack(0, np.zeros(tokens, np.uint16), weights, lengths)]).to(device)
    with autocast(device, dtype), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = CausalLM(model.shape)(model, batch)
    assert loss.grad_fn, "nothing is trained"  # The graph lives to here: no storage's address was used again.
    return sum(kept.values())


def settle_pass_tokens(config: Config, model: Transformer, dtype: torch.dtype, before: int | None = None) -> int:
    """Tokens of a step that go through the model at once, as `batch.pass_tokens` says; 0: one pack.

    `auto` on a GPU: for as many as 70 % of what weights, gradients and optimizer leave of this worker's part of its
    memory holds what backward needs. Small passes leave a GPU waiting: of a 64M model, 8,192 tokens run at a sixth of
    the rate of 131,072 on an H100. A run that goes on does as it did `before`, so that it adds up its gradients in the
    same order, unless it has come to a GPU with less memory.
    """
    if config.batch.pass_tokens != "auto":
        return config.batch.pass_tokens
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 0
    length = config.data.max_seq_len
    one, two = (kept_for_backward(model, length, documents, 1.0, dtype) for documents in (1, 2))
    share = min(1.0, config.scale.gpus_per_worker or 1.0)
    memory = share * torch.cuda.get_device_properties(device).total_memory
    lasting = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    fitting = max(0, min(GPU_PASS, int(0.7 * (memory - lasting) * length / (two - one))))
    return min(before, fitting) if before else fitting  # Begun on a CPU, it had none.
