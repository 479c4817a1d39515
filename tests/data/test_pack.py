"""Packing: nothing lost, nothing too long, nearly full, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind_ray.data.pack import Document, Group, Pack, pack_from_row, pack_groups, packs_table

pytestmark = pytest.mark.unit


def document(length: int, first: int = 0) -> Document:
    return Document(np.arange(first, first + length, dtype=np.int32), np.ones(length, np.uint8))


def group_tokens(group: Group) -> int:
    return sum(len(d.tokens) for d in group)


@given(
    st.lists(st.lists(st.integers(2, 50), min_size=1, max_size=2), max_size=80),
    st.integers(100, 200),
    st.integers(1, 30),
)
def test_every_group_is_in_one_pack_and_no_pack_is_too_long(
    lengths: list[list[int]], pack_tokens: int, window: int
) -> None:
    groups = [tuple(document(n) for n in pair) for pair in lengths]
    packs = list(pack_groups(groups, pack_tokens, window))
    packed = [group for pack in packs for group in pack]
    assert sorted(map(id, packed)) == sorted(map(id, groups))  # pairs are still whole: the same tuples
    assert all(0 < sum(map(group_tokens, pack)) <= pack_tokens for pack in packs)


def test_packs_of_mixed_lengths_are_nearly_full_and_the_same_in_a_second_run() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.9, 20_000), 3, 512).astype(int)
    groups = [(document(n),) for n in lengths]
    packs = list(pack_groups(groups, 4096))
    assert lengths.sum() / (len(packs) * 4096) > 0.99
    again = list(pack_groups(groups, 4096))
    assert [[group_tokens(g) for g in pack] for pack in packs] == [[group_tokens(g) for g in pack] for pack in again]


def test_the_best_fit_is_taken() -> None:
    packs = list(pack_groups([(document(n),) for n in (6, 5, 4, 3, 2)], 10))
    assert [[group_tokens(g) for g in pack] for pack in packs] == [[6, 4], [5, 3, 2]]


def test_short_groups_keep_their_order_so_that_a_pack_has_all_lengths() -> None:
    packs = list(pack_groups([(document(n),) for n in (10, 60) * 500], 4096))
    for pack in packs[:-1]:
        assert 0.4 < sum(group_tokens(group) == 10 for group in pack) / len(pack) < 0.6


def test_full_packs_are_given_out_while_groups_still_come() -> None:
    taken = 0

    def groups():
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield (document(7),)

    next(pack_groups(groups(), 20, window=64))
    assert taken <= 128


def test_a_group_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="a group of 12 tokens does not fit a pack of 10"):
        list(pack_groups([(document(6), document(6))], 10))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6400, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_a_table_gives_back_the_packs(vocab_size: int, dtype: type) -> None:
    pair = (document(3, first=vocab_size - 3), Document(np.array([5, 6], np.int32), np.array([0, 1], np.uint8)))
    table = packs_table([[pair, (document(2),)], [(document(4),)]], vocab_size)
    first, second = (pack_from_row(table, row, id=row + 7) for row in range(2))
    assert (first.id, second.id) == (7, 8)
    assert first.tokens.dtype == dtype
    assert first.tokens.tolist() == [vocab_size - 3, vocab_size - 2, vocab_size - 1, 5, 6, 0, 1]
    assert first.weights.tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert first.lengths.tolist() == [3, 2, 2]
    assert (first.lengths.dtype, first.weights.dtype) == (np.int32, np.uint8)
    assert (second.tokens.tolist(), second.lengths.tolist()) == ([0, 1, 2, 3], [4])
    assert isinstance(first, Pack)
    assert not first.columns
    assert packs_table([], vocab_size).num_rows == 0
