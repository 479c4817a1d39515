"""The decoder-only transformer. One network covers the shapes of all `families`.

    N tokens of the batch   M a selection of tokens   C channels   V vocabulary   F feed-forward
    H query heads   G key/value heads   K head size   R = K / 2 rotary pairs   D documents

A batch is ragged: documents one after another, without padding. Attention stays within a document, and positions start
at 0 in each document; all other operations work on [N, C]. Parameters have Hugging Face's names, which MiniMind also
uses.

Training calls the model as `model(tokens, bounds)`. Generation calls `decode` with its own positions and attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.attention import Layout
from minimind_ray.model.moe import MixtureOfExperts
from minimind_ray.model.ops import add_norm, linears, norm_rotate, product_dtype, rotate, swiglu

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""An attention function: (layer, q_NHK scaled by 1 / sqrt(K), k_NGK, v_NGK) -> out_NHK.

It decides which tokens attend to which tokens; `attention.py` and `cache.py` make such functions.
"""


class RMSNorm(nn.Module):
    """The weight and epsilon of an RMSNorm. `ops` computes the norm, fused with the operation before or after it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    With qk_norm, queries and keys are first normalised per head. With qkv_bias, the projections to queries, keys and
    values have a bias.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)
        if shape.qk_norm:
            self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
            self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x_NC: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        """Return the output of attention, [N, C]. `rotary` is cosine and sine, `layer` this layer's number."""
        projected = linears(x_NC, self.q_proj, self.k_proj, self.v_proj)
        q_NHK, k_NGK, v_NGK = (y.unflatten(-1, (-1, self.shape.head_dim)) for y in projected)
        scale = self.shape.head_dim**-0.5
        if self.shape.qk_norm:
            q_NHK = norm_rotate(q_NHK, self.q_norm.weight, self.q_norm.eps, rotary, scale)
            k_NGK = norm_rotate(k_NGK, self.k_norm.weight, self.k_norm.eps, rotary)
        else:
            q_NHK, k_NGK = rotate(q_NHK, rotary, scale), rotate(k_NGK, rotary)
        return self.o_proj(attend(layer, q_NHK, k_NGK, v_NGK).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        """Map [N, C] to [N, C]."""
        return self.down_proj(swiglu(*linears(x_NC, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream, with dropout on their outputs."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if shape.num_experts:
            width = shape.moe_intermediate_size or shape.intermediate_size
            self.mlp = MixtureOfExperts(shape, lambda: FeedForward(shape.hidden_size, width))
        else:
            self.mlp = FeedForward(shape.hidden_size, shape.intermediate_size)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, x_NC: Tensor, delta_NC: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Take a residual stream x and the delta to be added to it next; return both after this block."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        x_NC, normed_NC = add_norm(x_NC, delta_NC, before.weight, before.eps)
        delta_NC = self.dropout(self.self_attn(normed_NC, rotary, layer, attend))
        x_NC, normed_NC = add_norm(x_NC, delta_NC, after.weight, after.eps)
        return x_NC, self.dropout(self.mlp(normed_NC))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: the part that Hugging Face names `model`."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        # Made from an empty tensor, because nn.Embedding would draw random weights that `Transformer` draws again.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(shape.vocab_size, shape.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, tokens_N: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return the hidden states after the last norm, [N, C]."""
        x_NC = self.dropout(self.embed_tokens(tokens_N))
        delta_NC = torch.zeros_like(x_NC, dtype=product_dtype(x_NC))
        for index, layer in enumerate(self.layers):
            x_NC, delta_NC = layer(x_NC, delta_NC, rotary, index, attend)
        return add_norm(x_NC, delta_NC, self.norm.weight, self.norm.eps)[1]


class Transformer(nn.Module):
    """A language model of the given shape.

    Matrices are drawn from N(0, initializer_range) by torch's global random generator; biases are 0.
    """

    frequencies: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape, self.lengths_D = shape, None
        self.model = Decoder(shape)
        if not shape.tie_word_embeddings:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        frequencies_R, self.rotary_scale = rotary_frequencies(shape)
        self.register_buffer("frequencies", frequencies_R, persistent=False)
        for name, parameter in self.named_parameters():
            # Skip the meta device, which has no values: drawing there would import torch's compiler, for seconds.
            if parameter.ndim == 2 and not parameter.is_meta:
                nn.init.normal_(parameter, std=shape.initializer_range)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens_N: Tensor, bounds_D1: Tensor) -> Tensor:
        """Return hidden states [N, C] after the last norm. `bounds_D1`, int32 on the host: document starts, then N."""
        count = len(tokens_N)
        extra = self.stable_size(count) - count
        if extra:  # Add a document of padding.
            tokens_N, bounds_D1 = F.pad(tokens_N, (0, extra)), F.pad(bounds_D1, (0, 1), value=count + extra)
        layout = Layout(bounds_D1, tokens_N.device)

        def attend(_: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            return layout.attend(q_NHK, k_NGK, v_NGK)

        hidden_NC = self.decode(tokens_N, layout.positions_N, attend, layout.lengths_D)
        return hidden_NC[:count]

    def stable_size(self, count: int) -> int:
        """Return `count` rounded up by at most 1/32, so that only few sizes occur in training.

        For every new size a CPU sets up a matrix product, which takes 6 % of a small model's step. And if sizes repeat,
        memory that one step frees fits the next step. Models with experts are not padded, because padding would count
        in their load balance.
        """
        grain = 1 if self.shape.num_experts else 1 << max(0, count.bit_length() - 6)
        return -(-count // grain) * grain

    def decode(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, lengths_D: Tensor | None = None) -> Tensor:
        """Like `forward`, but the caller gives positions and attention. Generation attends through its cache.

        `lengths_D`, the length of each document, is needed only for a later `aux_loss`.
        """
        self.lengths_D = lengths_D
        angles_NR = positions_N.unsqueeze(-1).float() * self.frequencies
        rotary = (angles_NR.cos() * self.rotary_scale, angles_NR.sin() * self.rotary_scale)
        return self.model(tokens_N, rotary, attend)

    @property
    def vocab_weight(self) -> Tensor:
        """The weight of the projection to the vocabulary; with tied embeddings it is the embedding's weight."""
        return self.model.embed_tokens.weight if self.shape.tie_word_embeddings else self.lm_head.weight

    def project(self, hidden_MC: Tensor) -> Tensor:
        """Return the logits [M, V] of hidden states."""
        return F.linear(hidden_MC, self.vocab_weight)

    def aux_loss(self) -> Tensor:
        """Return the routers' load-balancing loss: a mean over the last forward pass's tokens, summed over layers."""
        experts = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        if not experts:
            return self.vocab_weight.new_zeros(())
        assert self.lengths_D is not None, "no forward pass yet"
        return torch.stack([each.aux_loss(self.lengths_D) for each in experts]).sum()


def rotary_frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, float32 [R], and the factor on cosine and sine.

    The angle of pair i is θ^(-2i/K). YaRN (Peng et al. 2023, section 3.2) divides the angles of slow pairs by its
    factor and leaves fast pairs unchanged. Pairs that turn between beta_slow and beta_fast times over the original
    length are blended linearly.
    """
    # Always on the CPU, even if the weights are made on the meta device.
    exponents_R = torch.arange(0, shape.head_dim, 2, device="cpu").float() / shape.head_dim
    frequencies_R = 1.0 / shape.rope_theta**exponents_R
    yarn = shape.rope_scaling
    if yarn is None:
        return frequencies_R, 1.0

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return shape.head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(shape.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), shape.head_dim - 1)
    pairs_R = torch.arange(shape.head_dim // 2, device="cpu").float()
    interpolated_R = ((pairs_R - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies_R * (1 - interpolated_R + interpolated_R / yarn.factor), yarn.attention_factor
