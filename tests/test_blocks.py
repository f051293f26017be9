"""The block pool: references, reuse and order of eviction."""

import pytest

from lory_server.blocks import BlockPool, chain_hash, root_hash


def published(pool: BlockPool, count: int, name: str) -> tuple[list[int], list[bytes]]:
    blocks = pool.allocate(count)
    assert blocks is not None
    hashes = []
    parent = root_hash("tenant", name)
    for i, block in enumerate(blocks):
        parent = chain_hash(parent, [i])
        pool.publish(block, parent)
        hashes.append(parent)
    return blocks, hashes


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    assert len(pool.allocate(4) or []) == 4
    assert pool.allocate(1) is None
    pool.check()


def test_a_released_prefix_is_found_again_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, 16)
    blocks, hashes = published(pool, 3, "a")
    pool.release(blocks)
    assert pool.num_cached == 3
    assert pool.find(hashes) == blocks
    pool.allocate(2)  # the never-used block first, then the tail of the prefix
    assert pool.find(hashes) == blocks[:2]
    pool.check()


def test_a_shared_block_stays_until_its_last_holder_leaves() -> None:
    pool = BlockPool(2, 16)
    blocks, hashes = published(pool, 2, "a")
    pool.hold(pool.find(hashes))
    pool.release(blocks)
    assert pool.num_used == 2
    assert pool.allocate(1) is None
    pool.release(blocks)
    assert pool.num_used == 0
    pool.check()


def test_two_tenants_or_two_sets_of_weights_never_share_a_root() -> None:
    roots = {root_hash(*pair) for pair in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"))}
    assert len(roots) == 4


def test_releasing_a_free_block_is_an_error_not_a_leak() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(2, 16)
    pool._free.popitem()
    with pytest.raises(AssertionError, match="partition"):
        pool.check()
