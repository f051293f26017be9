"""The layers of a decoder as a program: recorded once, run in one call a step.

Between the ops of a step there is then nobody to wait for: neither the interpreter nor another
thread that holds its lock. It must not know what the layers do: it is given what runs them, and
buffers that never move.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_kernels.contract import MAX_RANK, Segments
from lory_kernels.cpu import CpuOps
from lory_server.model.batch import ForwardBatch
from lory_server.model.kv import KVCache


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the layers of one step read and write."""

    residual_TH: Tensor
    mixed_TN: Tensor
    """What attention mixes, [T, q_size]."""
    inner_TI: Tensor

    def first(self, num_tokens: int) -> "Workspace":
        """The rows of a step; ValueError if there are not as many."""
        if num_tokens > self.residual_TH.shape[0]:
            raise ValueError(
                f"a step of {num_tokens} tokens, recorded for {self.residual_TH.shape[0]}"
            )
        return Workspace(
            self.residual_TH[:num_tokens], self.mixed_TN[:num_tokens], self.inner_TI[:num_tokens]
        )


RunLayers = Callable[[Workspace, ForwardBatch, KVCache], Tensor]


class LayersProgram:
    def __init__(self, ops: CpuOps, run_layers: RunLayers, work: Workspace, kv: KVCache) -> None:
        """For steps of as many tokens as the workspace has rows."""
        max_tokens = work.residual_TH.shape[0]
        self.work = work
        self._ops = ops
        self._kv = kv
        with ops.caller.record(max_tokens) as program:
            self._branch_TH = run_layers(work, _any_batch(max_tokens), kv)
            self._program = program()

    @property
    def num_bytes(self) -> int:
        work = self.work
        own = work.residual_TH.nbytes + work.mixed_TN.nbytes + work.inner_TI.nbytes
        return own + self._program.num_bytes

    def run(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """The last branch, from the residual in the workspace; the next run overwrites both."""
        assert kv is self._kv, "recorded with another cache"
        step = self._ops.step(
            batch.positions_T,
            batch.kv_slots_T,
            batch.block_tables_RM,
            batch.query_starts_R1,
            batch.context_lens_R,
            batch.lora,
        )
        self._program.run(step)
        return self._branch_TH[: step.tokens]


def _any_batch(num_tokens: int) -> ForwardBatch:
    """Of adapted rows, so that SGMV is called; nothing of it but its size is recorded."""
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    return ForwardBatch(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        positions_T=torch.zeros(num_tokens, dtype=torch.int64),
        kv_slots_T=torch.zeros(num_tokens, dtype=torch.int64),
        query_starts_R1=starts,
        context_lens_R=starts[1:],
        block_tables_RM=torch.zeros((1, 1), dtype=torch.int32),
        logit_rows_L=torch.zeros(0, dtype=torch.int64),
        lora=Segments(
            starts_G1=starts,
            slots_G=torch.zeros(1, dtype=torch.int32),
            num_rows=num_tokens,
            num_segments=1,
            max_rank=MAX_RANK,
            adapted_rows=num_tokens,
        ),
    )
