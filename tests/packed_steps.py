"""Drives a decoder the way an engine does, for tests: packed steps over paged KV.

Several sequences, each cut in its own chunks, advance together; their blocks are drawn in random
order from one pool, so that a wrong table, slot or mask reads another sequence's keys.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from lory_kernels import Segments
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache

BLOCK_SIZE = 4


def make_kv(decoder: Decoder, num_tokens: int) -> KVCache:
    num_blocks = num_tokens // BLOCK_SIZE + 8
    return KVCache.allocate(decoder.spec, num_blocks, BLOCK_SIZE, decoder.dtype, decoder.device)


def make_batch(
    tokens: Sequence[Sequence[int]], starts: Sequence[int], tables: Sequence[Sequence[int]]
) -> ForwardBatch:
    """Sequence r computes tokens[r] from position starts[r] on; logits of every row."""
    lens = [len(part) for part in tokens]
    longest = max(len(table) for table in tables)
    positions = [start + i for start, n in zip(starts, lens, strict=True) for i in range(n)]
    owners = [row for row, n in enumerate(lens) for _ in range(n)]
    slots = [
        tables[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for row, position in zip(owners, positions, strict=True)
    ]
    ends = [start + n for start, n in zip(starts, lens, strict=True)]
    bounds = [sum(lens[:row]) for row in range(len(lens) + 1)]
    padded = [list(table) + [0] * (longest - len(table)) for table in tables]
    return ForwardBatch(
        token_ids_T=torch.tensor([token for part in tokens for token in part]),
        positions_T=torch.tensor(positions),
        kv_slots_T=torch.tensor(slots),
        query_starts_R1=torch.tensor(bounds, dtype=torch.int32),
        context_lens_R=torch.tensor(ends, dtype=torch.int32),
        block_tables_RM=torch.tensor(padded, dtype=torch.int32),
        logit_rows_L=torch.arange(sum(lens)),
    )


def run(
    decoder: Decoder,
    sequences: Sequence[Sequence[int]],
    chunks: Sequence[Sequence[int]],
    lora: Segments | None = None,
    seed: int = 0,
    is_long: bool = False,
) -> list[torch.Tensor]:
    """Logits of every position of every sequence, computed chunk by chunk.

    chunks[r] are the sizes of the first steps of sequence r; what is left goes token by token.
    `is_long`: with the second of two sets of rotations, if there are two.
    """
    total = sum(len(tokens) + BLOCK_SIZE for tokens in sequences)
    kv = make_kv(decoder, total)
    order = torch.randperm(kv.num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = [[order.pop() for _ in range(len(tokens) // BLOCK_SIZE + 1)] for tokens in sequences]
    pending = [list(sizes) for sizes in chunks]
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    while any(position < len(tokens) for position, tokens in zip(done, sequences, strict=True)):
        live = [row for row, tokens in enumerate(sequences) if done[row] < len(tokens)]
        sizes = [pending[row].pop(0) if pending[row] else 1 for row in live]
        parts = [
            sequences[row][done[row] : done[row] + size]
            for row, size in zip(live, sizes, strict=True)
        ]
        batch = make_batch(parts, [done[row] for row in live], [tables[row] for row in live])
        positions_T = batch.positions_T + (decoder.short_tokens if is_long else 0)
        logits_LV = decoder.forward(replace(batch, positions_T=positions_T, lora=lora), kv)
        for row, part_LV in zip(live, logits_LV.split([len(p) for p in parts]), strict=True):
            logits[row].append(part_LV)
            done[row] += part_LV.shape[0]
    return [torch.cat(parts) for parts in logits]


def random_ids(count: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()
