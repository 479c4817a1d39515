"""A frozen model with the LoRA adapters of many runs, for train/fused.py. One forward pass computes all of them.

    K adapters   N tokens   J adapters that have tokens in this batch   L tokens of each adapter after padding
    S = J · L   R the largest rank   I, O a projection's inputs and outputs   P numbers of an adapter, ranks padded
    V vocabulary

In a batch, the tokens are grouped by adapter, in the order of the adapters, and each group is padded to the length of
the longest group. So a frozen projection is a single product over [S, I], and the adapters are batched products over J.
Smaller ranks are padded with zeros to R. The padding stays zero: the gradient of A's padded rows is a product with B's
padded columns, which are zero, and the gradient of B's padded columns is a product with A's padded rows.

A token's id contains its adapter: id + V · adapter. So the batch needs no extra field, and objectives need no extra
code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind_ray.config.schema import ModelShape
from minimind_ray.model.lora import adapters
from minimind_ray.model.ops import product_dtype
from minimind_ray.model.transformer import Attend, Transformer


class AdapterStack:
    """The layout of K models' adapters in one array [K, P]. Within it, A is [K, R, I] and B is [K, R, O].

    All models have adapters on the same projections.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.layers_K = [adapters(model) for model in models]
        first = self.layers_K[0]
        assert all(list(layers) == list(first) for layers in self.layers_K)
        self.sizes = {name: tuple(layer.weight.shape) for name, layer in first.items()}
        self.rank = max(next(iter(layers.values())).config.rank for layers in self.layers_K)
        self.device = next(iter(first.values())).weight.device
        scales = [next(iter(layers.values())).scale for layers in self.layers_K]
        self.scale_K11 = torch.tensor(scales, device=self.device).view(-1, 1, 1)

    def zeros(self) -> Tensor:
        """Return an array of zeros, [K, P]."""
        width = sum(self.rank * (rows + columns) for rows, columns in self.sizes.values())
        return torch.zeros(len(self.layers_K), width, device=self.device)

    def matrices(self, array_KP: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return for each projection the views A [K, R, I] and B [K, R, O] of an array."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for name, (rows, columns) in self.sizes.items():
            middle, end = start + self.rank * columns, start + self.rank * (columns + rows)
            a_KRI = array_KP[:, start:middle].unflatten(1, (self.rank, columns))
            found[name] = a_KRI, array_KP[:, middle:end].unflatten(1, (self.rank, rows))
            start = end
        return found

    def of(self, adapter: int, array_KP: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each parameter of one adapter with its view of the array."""
        matrices = self.matrices(array_KP)
        for name, layer in self.layers_K[adapter].items():
            a_KRI, b_KRO = matrices[name]
            yield layer.lora_A, a_KRI[adapter, : layer.config.rank]
            yield layer.lora_B, b_KRO[adapter, : layer.config.rank].t()


class FusedTransformer(Transformer):
    """A frozen model with the adapters of an array [K, P].

    Its `leaves`, the tensors that get gradients, are A and B of each projection, as views of the array. `weights` are
    the base's weights by name, shared with other models. Products with frozen weights are in `dtype`.
    """

    def __init__(
        self, shape: ModelShape, weights: Mapping[str, Tensor], stack: AdapterStack, values_KP: Tensor,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        with torch.device("meta"):
            super().__init__(shape)
        self.load_state_dict(weights, assign=True)
        self.to(stack.device).requires_grad_(False)
        for linear in self.model.modules():
            if isinstance(linear, nn.Linear):  # Cast once, not in every pass.
                for name, parameter in list(linear.named_parameters()):
                    setattr(linear, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        self.layers, self.leaves = list[FusedLinear](), list[Tensor]()
        for name, matrices in stack.matrices(values_KP).items():
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            # Plain tensors, because a parameter has to be contiguous.
            a_KRI, b_KRO = (matrix.detach().requires_grad_() for matrix in matrices)
            self.leaves += [a_KRI, b_KRO]
            self.layers.append(fused := FusedLinear(linear, a_KRI, b_KRO, stack.scale_K11))
            parent, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(parent), leaf, fused)

    def stable_size(self, count: int) -> int:
        """Return `count`: `decode` itself pads the tokens of every adapter."""
        return count

    def decode(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, lengths_D: Tensor | None = None) -> Tensor:
        """Like `Transformer.decode`, for token ids that contain their adapters.

        The tokens are grouped by adapter. An adapter may have no tokens.
        """
        adapter_J, counts_J = (tokens_N // self.shape.vocab_size).unique_consecutive(return_counts=True)
        tokens_N = tokens_N % self.shape.vocab_size
        for layer in self.layers:
            layer.present_J = adapter_J
        length = super().stable_size(int(counts_J.max()))
        starts_J1 = (counts_J.cumsum(0) - counts_J).unsqueeze(1)
        columns_L = torch.arange(length, device=tokens_N.device)
        real_S = (columns_L < counts_J.unsqueeze(1)).flatten()
        row_S = (starts_J1 + torch.minimum(columns_L, counts_J.unsqueeze(1) - 1)).flatten()
        place_N = real_S.nonzero().squeeze(1)

        def attend_real(layer: int, q_SHK: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> Tensor:
            q_NHK, k_NGK, v_NGK = (x.index_select(0, place_N) for x in (q_SHK, k_SGK, v_SGK))
            return attend(layer, q_NHK, k_NGK, v_NGK).index_select(0, row_S)

        attend_S = attend if len(row_S) == len(tokens_N) else attend_real
        return super().decode(tokens_N[row_S], positions_N[row_S], attend_S, lengths_D).index_select(0, place_N)


class FusedLinear(nn.Module):
    """A frozen projection with K adapters: x Wᵀ + b + s_k · x A_kᵀ B_kᵀ for the rows of adapter k."""

    present_J: Tensor

    def __init__(self, frozen: nn.Linear, a_KRI: Tensor, b_KRO: Tensor, scale_K11: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = frozen.weight, frozen.bias
        self.a_KRI, self.b_KRO, self.scale_K11 = a_KRI, b_KRO, scale_K11

    def forward(self, x_SI: Tensor) -> Tensor:
        """Map [S, I] to [S, O]. The rows belong to the adapters `present_J`, L rows to each."""
        x_SI = x_SI.to(product_dtype(x_SI))
        matrices = self.a_KRI, self.b_KRO, self.scale_K11
        if len(self.present_J) < len(self.a_KRI):
            matrices = tuple(m.index_select(0, self.present_J) for m in matrices)
        a_JRI, b_JRO, scale_J11 = matrices
        h_JLR = torch.bmm(x_SI.unflatten(0, (len(a_JRI), -1)), a_JRI.mT) * scale_J11
        y_SO = F.linear(x_SI, self.weight, self.bias)
        return torch.baddbmm(y_SO.unflatten(0, (len(a_JRI), -1)), h_JLR, b_JRO).flatten(0, 1)
