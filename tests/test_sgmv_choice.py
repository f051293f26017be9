"""How SGMV is cut up: by sizes alone, whole, and bounded."""

import itertools

import pytest

from lory_kernels.sgmv_choice import (
    MAX_SPLITS,
    MIN_BLOCK_RANK,
    MIN_SPLIT_FEATURES,
    RULES,
    TARGET_PROGRAMS,
    UNALIGNED,
    Cut,
    cut_up,
    rule_for,
)

SIZES = [
    size
    for size in itertools.product(
        (2, 4),
        (True, False),
        (1, 7, 256, 257, 512, 2112, 4097, 65536),
        (1, 3, 65, 512, 1024),
        (1, 8, 17, 64, 100, 256),
        (1, 37, 576, 4096, 14336),
        (1, 2, 3),
    )
    if size[3] <= size[2] + 512
]


def cuts() -> list[tuple[tuple[int, ...], Cut]]:
    return [(size, cut_up(*size)) for size in SIZES]


def test_a_decode_has_small_tiles_and_splits_until_the_device_is_full() -> None:
    alone, distinct, full = (cut_up(2, True, rows, rows, 16, 4096, 3) for rows in (1, 32, 256))
    assert {cut.rule.tile_rows for cut in (alone, distinct, full)} == {16}
    assert (alone.splits, distinct.splits, full.splits) == (16, 3, 1)
    assert (alone.tiles, distinct.tiles, full.tiles) == (1, 32, 256)
    assert 32 * 3 * distinct.splits >= TARGET_PROGRAMS


def test_more_rows_of_few_adapters_have_larger_tiles_and_fewer_splits() -> None:
    rules = [cut_up(2, True, rows, 2, 16, 4096, 3) for rows in (200, 2048, 8192)]
    assert [cut.rule.tile_rows for cut in rules] == [16, 64, 128]
    assert [cut.splits for cut in rules] == [6, 3, 2]
    assert cut_up(2, True, 65536, 2, 16, 4096, 3).splits == 1


def test_many_rows_of_as_many_adapters_are_a_decode() -> None:
    assert rule_for(2, True, 512, 512) is rule_for(2, True, 1, 1)
    assert rule_for(2, True, 8192, 512) is not rule_for(2, True, 1, 1)
    assert rule_for(2, True, 8192, 512) is not rule_for(2, True, 8192, 4)


def test_widths_that_cannot_be_read_in_16_bytes_have_a_rule_of_their_own() -> None:
    assert rule_for(2, False, 8192, 1) is rule_for(2, False, 1, 1) is UNALIGNED
    assert rule_for(4, False, 8192, 1) is rule_for(4, True, 8192, 1)


def test_tiles_are_enough_for_any_table_of_that_size() -> None:
    """Each segment may cut one tile short, and no more tiles than rows have rows."""
    for (_, _, rows, segments, *_), cut in cuts():
        longest = min(segments, rows)
        assert cut.tiles >= longest - 1 + -(-(rows - longest + 1) // cut.rule.tile_rows)
        assert cut.tiles <= rows


def test_splits_cover_the_features_and_none_is_empty() -> None:
    for (*_, in_features, _), cut in cuts():
        assert cut.split_features % cut.rule.shrink_block == 0
        assert cut.splits * cut.split_features >= in_features
        assert (cut.splits - 1) * cut.split_features < in_features
        assert 1 <= cut.splits <= cut.max_splits <= MAX_SPLITS
        assert cut.splits == 1 or in_features // cut.splits >= MIN_SPLIT_FEATURES


def test_blocks_of_rank_cover_every_rank_and_fit_each_other() -> None:
    for (_, _, _, _, max_rank, *_), cut in cuts():
        assert cut.h_width >= max_rank
        assert cut.h_width - cut.shrink_rank < max_rank
        assert cut.shrink_rank % cut.expand_rank == 0
        assert cut.expand_rank >= MIN_BLOCK_RANK


def test_what_is_compiled_depends_on_regime_and_bucket_of_rank_alone() -> None:
    """No other number of a step may reach a constant of the kernels."""
    compiled: dict[tuple[object, ...], set[tuple[int, int, int]]] = {}
    for (element_bytes, _, _, _, max_rank, *_), cut in cuts():
        bucket = min(64, max(16, 1 << (max_rank - 1).bit_length()))
        constants = (cut.shrink_rank, cut.expand_rank, cut.max_splits)
        compiled.setdefault((element_bytes, cut.rule, bucket), set()).add(constants)
    assert all(len(constants) == 1 for constants in compiled.values())
    assert len(compiled) == 3 * (sum(len(rules) for rules in RULES.values()) + 1)


def test_every_rule_says_why_and_that_it_was_not_measured() -> None:
    for rules in (*RULES.values(), [UNALIGNED]):
        assert all(rule.reason.endswith("Not measured yet.") for rule in rules)


def test_steps_beyond_all_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="num_rows: 4294967296 is above"):
        rule_for(2, True, 2**32, 1)
