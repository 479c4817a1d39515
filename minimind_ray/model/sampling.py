"""Choose the next token of an answer: the settings of a request, and the sampling itself.

    A sequences, each with its own settings   V vocabulary

A random number is a function of the request's seed and of the token's number in the answer. So an answer does not
depend on the other answers that are sampled at the same time, and sampling it again gives the same answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind_ray.config.errors import UserError

MASS = 2**40
"""The integer that stands for probability 1. Sums of integers are exact in any order, so a GPU repeats them exactly."""

BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "top_k": (0, math.inf),
    "repetition_penalty": (0.01, math.inf),
    "max_new_tokens": (1, math.inf),
}
"""The least and the largest value of each setting."""


@dataclass(frozen=True)
class Sampling:
    """The settings of one answer.

    Temperature 0 takes the most probable token. `top_k` (0: off) samples only from the `top_k` most probable tokens.
    `top_p` samples only from the most probable tokens that together reach this probability. `repetition_penalty`
    divides the positive logits, and multiplies the negative logits, of tokens that occur already (Keskar et al. 2019,
    section 4.1). The answer ends with one of `stop_ids` or after `max_new_tokens`. `seed` is a tuple of integers; each
    seed gives other random numbers.

    `log_probs`: return the log-probability of each token, see `Event`.

    Raises:
        UserError: a setting is not a finite number, or is not within BOUNDS.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    seed: tuple[int, ...] = (0,)
    log_probs: bool = False

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value, title = getattr(self, name), name.replace("_", "-")
            if not isinstance(value, int | float):
                raise UserError(f"{title} is {value!r}: give a number")
            if not math.isfinite(value):
                raise UserError(f"{title} is {value}: give a finite number")
            if not least <= value <= most:
                bounds = f"of at least {least}" if math.isinf(most) else f"from {least} to {most}"
                raise UserError(f"{title} is {value}: give a number {bounds}")

    @property
    def cuts(self) -> bool:
        """Whether improbable tokens are left out, by top_k or top_p."""
        return self.top_k > 0 or self.top_p < 1

    def uniform(self, index: int) -> float:
        """Return the random number in [0, 1) for token number `index` of the answer."""
        digest = hashlib.blake2b(repr((self.seed, index)).encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def choose(logits_AV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Return one token per row, int64 [A]: the most probable at temperature 0, otherwise sampled.

    `uniforms` are the rows' random numbers. A row's token depends only on its logits, settings and random number.
    """
    tokens_A = logits_AV.argmax(-1)
    for cuts in (False, True):  # Sort only the rows that need it.
        rows = [i for i, each in enumerate(samplings) if each.temperature > 0 and each.cuts == cuts]
        if rows:
            logits = logits_AV if len(rows) == len(samplings) else logits_AV[rows]
            tokens_A[rows] = _draw(logits, [samplings[i] for i in rows], [uniforms[i] for i in rows], cuts)
    return tokens_A


def _draw(logits_AV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], cuts: bool) -> Tensor:
    """Return one token per row, drawn by inverting the cumulative distribution."""

    def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_AV.device).unsqueeze(1)

    tiny = torch.finfo(logits_AV.dtype).tiny
    temperature_A1 = column([max(each.temperature, tiny) for each in samplings], logits_AV.dtype)
    # Subtract the largest logit: divided by a tiny temperature, logits may then become -inf but never inf.
    scaled_AV = (logits_AV - logits_AV.amax(-1, keepdim=True)) / temperature_A1
    order_AV = None
    if cuts:
        scaled_AV, order_AV = scaled_AV.sort(dim=-1, descending=True, stable=True)
    mass_AV = (scaled_AV.softmax(-1) * MASS).long()
    sums_AV = mass_AV.cumsum(-1)
    if cuts:
        size = logits_AV.shape[-1]
        top_k_A1 = column([min(each.top_k, size) or size for each in samplings]).long()
        top_p_A1 = column([each.top_p for each in samplings])
        # Drop a token if the tokens before it reach top_p already; the most probable token always stays.
        limit_A1 = (sums_AV.gather(1, top_k_A1 - 1) * top_p_A1).long().clamp(min=1)
        place_V = torch.arange(size, device=logits_AV.device)
        keep_AV = (place_V < top_k_A1) & (sums_AV - mass_AV < limit_A1)
        sums_AV = (mass_AV * keep_AV).cumsum(-1)
    total_A1 = sums_AV[:, -1:]
    point_A1 = torch.minimum((column(uniforms) * total_A1).long(), total_A1 - 1)
    index_A1 = torch.searchsorted(sums_AV, point_A1, right=True)
    return (index_A1 if order_AV is None else order_AV.gather(1, index_A1)).squeeze(1)
