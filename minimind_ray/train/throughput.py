"""Count parameters and FLOPs of a model, and measure the machine's matrix-product rate.

`Meter` computes MFU (model FLOPs utilisation) from these: a run's FLOPs per second, divided by the machine's.
"""

from __future__ import annotations

import math
import time

import torch

from minimind_ray.config.schema import ModelShape


def parameter_counts(shape: ModelShape) -> tuple[int, int]:
    """Return the number of parameters, and the number active for one token (with experts: the chosen experts')."""
    c, d = shape.hidden_size, shape.head_dim
    attention = 2 * c * d * (shape.num_attention_heads + shape.num_key_value_heads)
    if shape.qkv_bias:
        attention += d * (shape.num_attention_heads + 2 * shape.num_key_value_heads)
    norms = 2 * c + (2 * d if shape.qk_norm else 0)
    if shape.num_experts:
        expert = 3 * c * (shape.moe_intermediate_size or shape.intermediate_size)
        router = c * shape.num_experts
        always = expert * shape.n_shared_experts + router
        mlp, active_mlp = expert * shape.num_experts + always, expert * shape.num_experts_per_tok + always
    else:
        mlp = active_mlp = 3 * c * shape.intermediate_size
    outside = shape.vocab_size * c * (1 if shape.tie_word_embeddings else 2) + c
    layers = shape.num_hidden_layers
    return outside + layers * (attention + norms + mlp), outside + layers * (attention + norms + active_mlp)


def training_flops_per_token(shape: ModelShape, mean_context: float, frozen: bool = False) -> float:
    """Return the FLOPs of the forward and backward pass for one token (Chowdhery et al. 2022, PaLM, appendix B).

    Each active weight of a matrix product counts 6 (2 forward, 4 backward), or 4 if it is `frozen` and gets no
    gradient. The input embedding is a look-up and counts 0; an adapter's weights are too few to count. Attention counts
    12 · layers · heads · head_dim per attended token. `mean_context` is the mean number of tokens that a token attends
    to: half the document's length.
    """
    _, active = parameter_counts(shape)
    lookup = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    attention = 12 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * mean_context
    return (4 if frozen else 6) * (active - lookup) + attention


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure the FLOP/s of a large matrix product in `dtype` on `device`, with torch's current number of threads.

    Returns the rate of the fastest product within `seconds`, because other processes may slow some of them down.
    """
    size = 8192 if device.type == "cuda" else 1024
    # Multiply random numbers, because a GPU multiplies ones faster. A separate generator does not change the run's own
    # random numbers.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    torch.mm(a, b)
    _synchronize(device)
    end, fastest = time.perf_counter() + seconds, math.inf
    while (start := time.perf_counter()) < end:
        torch.mm(a, b)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
