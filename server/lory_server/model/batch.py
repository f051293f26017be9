"""What one forward pass computes: packed token rows of several sequences, as tensors.

Legend: T tokens of the step, R sequences (rows of the plan), M blocks of the longest block table,
L rows whose logits are wanted. This module must not know how a batch is chosen, nor what an
adapter is: `lora` is passed through the decoder to whatever is attached to its linears, `ends` to
what computes the ends of the model where they are not the base's.
"""

from dataclasses import dataclass

from torch import Tensor

from lory_kernels import Segments
from lory_server.model.ends import StepEnds


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Sequence r owns token rows query_starts[r] .. query_starts[r+1], its last tokens so far."""

    token_ids_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64; rows of the table of rotations: each token's position, or beyond all of those."""
    kv_slots_T: Tensor
    """int64; block * block_size + offset of each token's keys and values; negative: not written."""
    query_starts_R1: Tensor
    """int32, from 0 to T."""
    context_lens_R: Tensor
    """int32; tokens of each sequence after this step, so positions end at context_lens - 1."""
    block_tables_RM: Tensor
    """int32; blocks of each sequence in order, padded with any valid block."""
    logit_rows_L: Tensor
    """int64; token rows whose logits are wanted."""
    lora: Segments | None = None
    """None: no row of the batch uses an adapter."""
    ends: StepEnds | None = None
    """What rows have of their own beside that; None: nothing."""
