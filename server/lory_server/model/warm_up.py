"""Steps of padding, run op by op before the first request, so that no step compiles a kernel.

Kernels are cut up by the number of tokens and the largest rank, in a few classes each; one step of
each class compiles all that later steps need. Attention alone tells steps of one token a row from
others: one step of that kind is enough. Padding writes no key, is in no slot, and nobody reads what
it computes. This module must not know CUDA, plans or sampling.

Legend: T tokens of the step, R rows, L rows with logits, M blocks of a table, G segments.
"""

from itertools import product

import torch

from lory_kernels import BASE_SLOT, Segments
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.ends import HeadRows
from lory_server.model.kv import KVCache

NUM_TOKENS = (2, 5, 17, 33, 65, 129, 257)
"""One of each class of rows that NF4 products and SGMV know, and what may be the largest step."""
MAX_RANKS = (16, 32, 64)
"""One of each class of ranks; what is above 64 is cut into blocks of it."""
BASE_ONLY = 0
TABLE_BLOCKS = 512
"""Of a row: long contexts are split, by a kernel of its own, even if blocks hold one token."""


@torch.inference_mode()
def warm_up(decoder: Decoder, kv: KVCache, max_step_tokens: int, has_adapters: bool) -> int:
    """How many steps it took."""
    sizes = sorted({min(size, max_step_tokens) for size in (*NUM_TOKENS, max_step_tokens)})
    ranks = (BASE_ONLY, *MAX_RANKS) if has_adapters else (BASE_ONLY,)
    steps = [(1, BASE_ONLY), *product(sizes, ranks)]
    for num_tokens, max_rank in steps:
        batch = padding(num_tokens, max_rank, decoder.device)
        hidden_LH = decoder.hidden(batch, kv)
        decoder.logits(hidden_LH)
        if batch.lora is not None and decoder.adapts_head:
            # As many logit rows as tokens: the head's LoRA knows the same classes.
            rows_TH = hidden_LH.expand(num_tokens, -1).contiguous()
            decoder.logits(rows_TH, HeadRows((), batch.lora))
    return len(steps)


def padding(num_tokens: int, max_rank: int, device: torch.device) -> ForwardBatch:
    """One row of all tokens, to attention a prompt; or, if that is one token, a decode."""
    zeros_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    ends_2 = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    segments = Segments(
        starts_G1=ends_2,
        slots_G=torch.full((1,), BASE_SLOT, dtype=torch.int32, device=device),
        num_rows=num_tokens,
        num_segments=1,
        max_rank=max_rank,
        adapted_rows=num_tokens,
    )
    return ForwardBatch(
        token_ids_T=zeros_T,
        positions_T=zeros_T,
        kv_slots_T=zeros_T - 1,
        query_starts_R1=ends_2,
        context_lens_R=ends_2[1:],
        block_tables_RM=torch.zeros(
            (1, max(num_tokens, TABLE_BLOCKS)), dtype=torch.int32, device=device
        ),
        logit_rows_L=zeros_T[:1],
        lora=None if max_rank == BASE_ONLY else segments,
    )
