"""The pool of KV blocks: who holds which block, and which full blocks can be reused.

Blocks are reference-counted, so that sequences can share a prefix. A full block may be published
under a hash of everything that determined its KV (tenant, weights, all tokens up to its end); a
block nobody holds keeps its hash until it is handed out again, least recently freed first.

Pure bookkeeping over integers: this module must not know tensors, sequences or time.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def root_hash(tenant: str, weights: str, is_long: bool = False) -> BlockHash:
    """Start of a chain: two tenants, two sets of weights or of rotations never share KV.

    Fields are length-prefixed, so that no choice of names can make two roots collide.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"long" if is_long else b"")
    for part in (tenant.encode(), weights.encode()):
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.digest()


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block that follows `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def branch_hash(parent: BlockHash, weights: str, position: int) -> BlockHash:
    """Of no block: what a chain goes on from where other weights begin to compute, at `position`.

    Tokens do not tell where: a later prompt may hold the same ones, and begin further on.
    """
    digest = hashlib.blake2b(parent, digest_size=16, person=b"branch")
    digest.update(position.to_bytes(8, "big"))
    digest.update(weights.encode())
    return digest.digest()


class BlockPool:
    """Blocks 0..num_blocks-1, each either held (reference count > 0) or free."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {num_blocks}x{block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        # Free blocks in the order they are handed out: never used, then least recently freed.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_cached = 0
        """Free blocks that still hold reusable KV."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Hands out `count` blocks, forgetting what they held; None if there are too few."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._forget(block)
            self._references[block] = 1
        return blocks

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Blocks of the longest published prefix of a hash chain. Takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        return sum(1 for block in blocks if self._references[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each block; a free one leaves the free list."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
                self.num_cached -= self._hash_of[block] is not None
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each. Tails are reused before the prefix they extend."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise AssertionError(f"block {block} released more often than held")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self.num_cached += 1

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Makes a held, full block findable. The first block published under a hash stays."""
        if self._references[block] <= 0:
            raise AssertionError(f"block {block} published while free")
        if block_hash not in self._by_hash and self._hash_of[block] is None:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def check(self) -> None:
        """Raises AssertionError unless free + used = total and every index agrees."""
        held = {block for block, count in enumerate(self._references) if count > 0}
        if held & self._free.keys() or len(held) + len(self._free) != self.num_blocks:
            raise AssertionError("free and held blocks do not partition the pool")
        if any(count < 0 for count in self._references):
            raise AssertionError("negative reference count")
        published = {h: b for b, h in enumerate(self._hash_of) if h is not None}
        num_cached = sum(1 for block in self._free if self._hash_of[block] is not None)
        if published != self._by_hash or num_cached != self.num_cached:
            raise AssertionError("hash index disagrees with the blocks")

    def _forget(self, block: int) -> None:
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._hash_of[block] = None
            self.num_cached -= 1
