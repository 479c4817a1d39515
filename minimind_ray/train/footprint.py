"""Estimate the memory that training takes on a worker, and choose how many tokens to pass through the model at once.

Training holds weights, gradients, the optimizer's state, and activations: tensors that the forward pass saves for the
backward pass. `plan` shows the estimate to the user; the training loop uses it for `batch.pass_tokens: auto`.
"""

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
"""About so many tokens go through a small model on the CPU, in order to measure its activations."""
GPU_PASS = 2**17
"""Maximum tokens of a pass through the model on a GPU with `batch.pass_tokens: auto`."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory on a worker, and the number of trained parameters.

    Frozen weights have neither gradients nor optimizer state.
    """

    trainable: int
    weights: int
    activations: int

    @property
    def gradients(self) -> int:
        """Bytes of gradients: one float32 for each trained parameter."""
        return 4 * self.trainable

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's two moments, float32."""
        return 8 * self.trainable

    @property
    def total(self) -> int:
        """Bytes of weights, gradients, optimizer state and activations together."""
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
    """Return the footprint of a model of `shape` that is trained on packs of `pack_tokens`.

    `adapt` puts adapters on the model, if the run trains any. `document` is the usual length of a document in tokens,
    `counted` the fraction of tokens that carry loss. Activations are an estimate: measured with one layer and two, on
    packs of two sizes, and extrapolated linearly in both.
    """
    with torch.device("meta"):
        model = Transformer(shape)
    adapt(model)
    parameters = list(model.parameters())
    length = max(2, min(round(document), PROBE_TOKENS))
    few = max(1, PROBE_TOKENS // length)

    def saved(documents: int) -> int:
        one, two = (_saved_bytes(shape, adapt, layers, length, documents, counted, dtype) for layers in (1, 2))
        return one + (two - one) * (shape.num_hidden_layers - 1)

    # A part of the saved bytes does not depend on the documents, such as the weights cast to bfloat16.
    per_document = (saved(2 * few) - saved(few)) / few
    return Footprint(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights=4 * sum(p.numel() for p in parameters),
        activations=round(saved(few) + per_document * (pack_tokens / length - few)),
    )


def _saved_bytes(
    shape: ModelShape,
    adapt: Callable[[Transformer], None],
    layers: int,
    length: int,
    documents: int,
    counted: float,
    dtype: torch.dtype,
) -> int:
    """Return the bytes that the forward pass of a model with so many layers saves for backward, without parameters."""
    with torch.device("meta"):
        model = Transformer(shape.model_copy(update={"num_hidden_layers": layers}))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(tensor.data)
    adapt(model)
    return saved_for_backward(model, length, documents, counted, dtype)


def saved_for_backward(model: Transformer, length: int, documents: int, counted: float, dtype: torch.dtype) -> int:
    """Return the bytes that a forward pass saves for backward, without parameters; documents have `length` tokens."""
    device = next(model.parameters()).device
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = length * documents
    weights = np.zeros(tokens, np.uint8)
    weights[: round(counted * tokens)] = 1
    lengths = np.full(documents, length, np.int32)
    batch = batch_from_packs([Pack(0, np.zeros(tokens, np.uint16), weights, lengths)]).to(device)
    with autocast(device, dtype), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = CausalLM(model.shape)(model, batch)
    assert loss.grad_fn, "nothing is trained"  # This use keeps the graph alive, so that no address is used twice.
    return sum(saved.values())


def settle_pass_tokens(config: Config, model: Transformer, dtype: torch.dtype, before: int | None = None) -> int:
    """Return how many tokens of a step go through the model at once, from `batch.pass_tokens`; 0: one pack at a time.

    On a GPU, `auto` takes so many tokens that their activations fit into 70 % of the free memory: this worker's share
    of the GPU, less weights, gradients and optimizer state. Small passes leave a GPU idle between kernels: for a 64M
    model on an H100, passes of 8,192 tokens run at a sixth of the rate of passes of 131,072.

    `before` is the number of the run before a resume. A resumed run uses the same number, so that it adds up its
    gradients in the same order, unless its new GPU has too little memory.
    """
    if config.batch.pass_tokens != "auto":
        return config.batch.pass_tokens
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 0
    length = config.data.max_seq_len
    one, two = (saved_for_backward(model, length, documents, 1.0, dtype) for documents in (1, 2))
    share = min(1.0, config.scale.gpus_per_worker or 1.0)
    memory = share * torch.cuda.get_device_properties(device).total_memory
    lasting = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    fitting = max(0, min(GPU_PASS, int(0.7 * (memory - lasting) * length / (two - one))))
    return min(before, fitting) if before else fitting  # `before` is 0 if the run began on a CPU.
