"""Log-likelihoods of continuations of texts, as benchmarks need them: ragged, without padding, each context read once.

    N tokens of one pass   M rows to project   P pairs of a row and a target   C channels   V vocabulary
    B documents of a bucket, padded to L tokens   H query heads, G key/value heads   K head size

Continuations of the same context form a group, such as the choices of a question. A group is one document of a ragged
batch: the context, then every continuation without its last token. A token of a continuation attends to the context and
to its own continuation, and its position is counted from the context's end. So the model reads a context once, however
many continuations it has, and continuations of a single token cost nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimind_ray.model.attention import Layout
from minimind_ray.model.transformer import Attend, Transformer

MOST_BRANCHES = 2048
"""The most tokens of a group with several continuations. Its attention needs a mask of this size, squared."""
PAIRS_PER_TOKEN = 1000
"""As many pairs of tokens attend to each other in the time that the rest of the model takes for a token, or more."""
MAX_LOGITS = 2**26
"""The most logits in memory at once."""
PASS_TOKENS = {"cpu": 4096, "cuda": 2**16}
"""Tokens of a forward pass, by the kind of device. A single group may have more."""


class Query(NamedTuple):
    """The ids of a context, at least one, and the ids of its continuation, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether each of its tokens is the most probable one."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class _Group:
    context: tuple[int, ...]
    queries: list[int]
    """The numbers of the queries."""
    size: int
    """The number of tokens."""


@torch.no_grad()
def log_likelihoods(
    model: Transformer, queries: Sequence[Query], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Likelihood]:
    """Return the likelihood of each query's continuation. The model is in eval mode; the caller enables autocast.

    If a context and its continuation have more tokens than the model has positions, the beginning of the context is cut
    off. `progress` is called after each pass with the number of queries that are answered, and of all queries.

    Raises:
        ValueError: a continuation alone has more tokens than the model has positions.
    """
    longest = model.shape.max_position_embeddings
    cut = [_cut(query, longest) for query in queries]
    found: list[Likelihood | None] = [None] * len(cut)
    done = 0
    for groups in _passes(_groups(cut), PASS_TOKENS[model.vocab_weight.device.type]):
        numbers = [number for group in groups for number in group.queries]
        for number, likelihood in zip(numbers, _read(model, groups, cut), strict=True):
            found[number] = likelihood
        done += len(numbers)
        progress(done, len(cut))
    return [each for each in found if each]


def _cut(query: Query, longest: int) -> Query:
    """Return the query without the beginning of its context that the model has no positions for.

    The last token of a continuation is only predicted, so it needs no position.
    """
    room = longest + 1 - len(query.continuation)
    if room < 1:
        raise ValueError(f"a continuation has {len(query.continuation):,} tokens, the model {longest:,} positions")
    return query if len(query.context) <= room else Query(query.context[-room:], query.continuation)


def _groups(queries: Sequence[Query]) -> list[_Group]:
    """Return the queries as groups with the same context, the largest groups first."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        by_context.setdefault(query.context, []).append(number)
    groups: list[_Group] = []
    for context, numbers in by_context.items():
        group = _Group(context, [], len(context))
        for number in numbers:
            more = len(queries[number].continuation) - 1
            if group.queries and not _worth(group, more):
                groups.append(group)
                group = _Group(context, [], len(context))
            group = _Group(context, [*group.queries, number], group.size + more)
        groups.append(group)
    return sorted(groups, key=lambda group: -group.size)


def _worth(group: _Group, more: int) -> bool:
    """Return whether to add a continuation of `more` + 1 tokens to a group, rather than to read its context again.

    A longer document has more pairs of tokens to attend to; the context's tokens are saved.
    """
    context = len(group.context)
    pairs = 2 * more * (group.size - context) - context**2
    return group.size + more <= MOST_BRANCHES and pairs <= PAIRS_PER_TOKEN * context


def _passes(groups: Sequence[_Group], most: int) -> Iterator[list[_Group]]:
    """Yield the groups of each pass: up to `most` tokens together, or a single group."""
    together: list[_Group] = []
    for group in groups:
        if together and sum(each.size for each in together) + group.size > most:
            yield together
            together = []
        together.append(group)
    if together:
        yield together


def _read(model: Transformer, groups: Sequence[_Group], queries: Sequence[Query]) -> list[Likelihood]:
    """Read the groups in one pass. Return the likelihoods of their queries, in the groups' order."""
    tokens: list[int] = []
    branches: list[int] = []  # 0 for a context, and 1, 2, … for the continuations of a group.
    positions: list[int] = []
    rows: list[int] = []  # Of each pair: the token that predicts.
    targets: list[int] = []
    for group in groups:
        end = len(group.context)
        last = len(tokens) + end - 1
        tokens += group.context
        branches += [0] * end
        positions += range(end)
        for branch, number in enumerate(group.queries, 1):
            continuation = queries[number].continuation
            first, more = len(tokens), len(continuation) - 1
            rows += [last, *range(first, first + more)]
            targets += continuation
            tokens += continuation[:-1]
            branches += [branch] * more
            positions += range(end, end + more)
    device = model.vocab_weight.device
    layout = Layout(torch.tensor([0, *(group.size for group in groups)]).cumsum(0).to(torch.int32), device)
    attend = _attention(layout, torch.tensor(branches))
    hidden_NC = model.decode(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), attend)
    logp_P, greedy_P = _score(model, hidden_NC, np.array(rows), np.array(targets))
    lengths = [len(queries[number].continuation) for group in groups for number in group.queries]
    starts = np.cumsum([0, *lengths[:-1]])
    sums, greedy = np.add.reduceat(logp_P, starts), np.logical_and.reduceat(greedy_P, starts)
    return [Likelihood(float(value), bool(best)) for value, best in zip(sums, greedy, strict=True)]


def _score(
    model: Transformer, hidden_NC: Tensor, row_P: np.ndarray, target_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each target's log-probability (float64) after its row, and whether it is the most probable token."""
    row_M, index_P = np.unique(row_P, return_inverse=True)
    logp_P, greedy_P = np.empty(len(row_P)), np.empty(len(row_P), bool)
    step = max(1, MAX_LOGITS // model.shape.vocab_size)
    for start in range(0, len(row_M), step):
        here = np.flatnonzero((index_P >= start) & (index_P < start + step))
        rows, targets = (torch.from_numpy(x).to(hidden_NC.device) for x in (index_P[here] - start, target_P[here]))
        taken = torch.from_numpy(row_M[start : start + step]).to(hidden_NC.device)
        logits_MV = model.project(hidden_NC[taken]).float()
        logp = logits_MV[rows, targets] - logits_MV.logsumexp(-1)[rows]
        logp_P[here] = logp.double().cpu().numpy()
        greedy_P[here] = (logits_MV.argmax(-1)[rows] == targets).cpu().numpy()
    return logp_P, greedy_P


def _attention(layout: Layout, branch_N: Tensor) -> Attend:
    """Return attention within each document, where a continuation does not see the others (see the module's text)."""
    if not bool(branch_N.gt(1).any()):  # No second continuation has tokens of its own: plain causal attention.
        return lambda layer, q_NHK, k_NGK, v_NGK: layout.attend(q_NHK, k_NGK, v_NGK)
    biases = [bias.to(layout.device) for bias in _biases(layout, branch_N)]

    def attend(layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        heads, groups = q_NHK.shape[1], k_NGK.shape[1]
        queries, keys = layout.index(heads), layout.index(groups)
        q, k, v = queries.pad(q_NHK), keys.pad(k_NGK), keys.pad(v_NGK)
        out = torch.empty_like(q)
        for bucket, bias_BLL in zip(layout.buckets, biases, strict=True):
            q_, out_ = (bucket.view(x, heads, groups) for x in (q, out))
            k_, v_ = (bucket.view(x, groups, groups).squeeze(1) for x in (k, v))
            scores = torch.bmm(q_.flatten(1, 2), k_.transpose(1, 2))
            scores.view(-1, heads, bucket.length, bucket.length).add_(bias_BLL.to(scores.dtype).unsqueeze(1))
            p = scores.softmax(-1, dtype=scores.dtype)
            out_.copy_(torch.bmm(p, v_).unflatten(1, (heads // groups, -1)))
        return queries.unpad(out, heads)

    return attend


def _biases(layout: Layout, branch_N: Tensor) -> Iterator[Tensor]:
    """Yield for each bucket what to add to the scores, [B, L, L]: 0 for a pair of tokens that attends, else -inf."""
    for documents, length, _ in layout.buckets:
        column_L = torch.arange(length)
        lengths_B1, starts_B1 = (x[documents].unsqueeze(1) for x in (layout.lengths_D, layout.starts_D))
        branch_BL = branch_N[starts_B1 + torch.minimum(column_L, lengths_B1 - 1)]
        sees_BLL = (branch_BL.unsqueeze(1) == 0) | (branch_BL.unsqueeze(1) == branch_BL.unsqueeze(2))
        sees_BLL &= column_L <= column_L.unsqueeze(1)
        yield torch.zeros(sees_BLL.shape).masked_fill_(~sees_BLL, -torch.inf)
