"""Decode steps that are captured once and replayed: one graph for each padded number of rows.

    token ids, known or in their lanes -> embed -> layers -> last norm      captured
    head -> logits -> sampler                                               not

A decode step computes one token for each row. Its rows are padded to the next captured number,
and all it reads lies in memory that never moves, rewritten in one copy before each replay:

    padding   its keys are not written (slot -1), it attends to one position of some valid block,
              it is in no segment, and nobody reads what it computes
    segments  a table of one segment a row, the last ones empty, so that any mix of adapters and
              base rows is the same graph; ranks and places are read from the adapters' tables

There are variants for base rows only and for a few largest ranks, because grids are sized by them.
The head stays out: its logits are the largest tensor of a step, and every graph would keep its
own. So does the sampler, which depends on what each row asks for. This module must not know
CUDA beyond `CudaCapture`, nor plans, sampling or the kernels.

Legend: T padded rows, each one token (so R = L = T), G segments, M blocks of a table, H hidden.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lory_kernels import BASE_SLOT, MAX_RANK, Segments
from lory_server.model.batch import ForwardBatch
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache
from lory_server.model.packing import Array, PackedSegments, PackedStep
from lory_server.model.staging import HostBuffer, Layout

BASE_ONLY = 0
RANK_BUCKETS = (16, 64, MAX_RANK)
"""Largest ranks that graphs are captured for: grids grow with the rank, so 256 for all would have
rank-16 adapters wait for blocks that leave at once. Not measured yet."""

MOST_ROWS = 512
"""Steps of more rows run op by op: by then the device is slower than the launches."""

NOT_WRITTEN = -1
KNOWN = -1
"""In place of a lane: the token's id is known to the host."""


class Graph(Protocol):
    """Something captured."""

    def replay(self) -> Tensor:
        """Computes it again from what its inputs hold now; always the same tensor."""
        ...


Capture = Callable[[Callable[[], Tensor]], Graph]


@dataclass(frozen=True, slots=True)
class CudaGraph:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


class CudaCapture:
    """Captures on a stream of its own; all graphs share one pool, for they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Graph:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and fills caches, neither of which may happen in a capture
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = run()
        return CudaGraph(graph, output)


def padded_rows(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, then two to a doubling, up to `max_rows` itself or MOST_ROWS."""
    most = min(max_rows, MOST_ROWS)
    powers = [1 << exponent for exponent in range(most.bit_length())]
    between = [3 * power // 2 for power in powers if power >= 16]
    return tuple(sorted({rows for rows in (*powers, *between, most) if rows <= most}))


def variants(has_adapters: bool) -> tuple[int, ...]:
    return (BASE_ONLY, *RANK_BUCKETS) if has_adapters else (BASE_ONLY,)


class DecodeInputs:
    """What graphs of `rows` rows read, on the device, and where it is written on the host."""

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        self.rows = rows
        self._layout = Layout(
            {
                "token_ids_T": (np.int64, (rows,)),
                "token_lanes_T": (np.int64, (rows,)),
                "positions_T": (np.int64, (rows,)),
                "kv_slots_T": (np.int64, (rows,)),
                "context_lens_R": (np.int32, (rows,)),
                "sampled_lanes_S": (np.int64, (rows,)),
                "starts_G1": (np.int32, (rows + 1,)),
                "slots_G": (np.int32, (rows,)),
                "block_tables_RM": (np.int32, (rows, max_blocks)),
            }
        )
        num_bytes = self._layout.num_bytes
        self._device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.tensors = self._layout.tensors(self._device_bytes)
        # Two, because the step before may still be read from the other.
        self._buffers = [HostBuffer(num_bytes, device) for _ in range(2)]
        self._arrays = [self._layout.arrays(buffer.array) for buffer in self._buffers]
        self._turn = 0
        # One token a row, whatever the step: nothing of these ever changes.
        self._query_starts_R1 = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._logit_rows_L = torch.arange(rows, device=device)
        self._send_padding()

    def batch(self, max_rank: int) -> ForwardBatch:
        there = self.tensors
        segments = Segments(
            starts_G1=there["starts_G1"],
            slots_G=there["slots_G"],
            num_rows=self.rows,
            num_segments=self.rows,
            max_rank=max_rank,
            adapted_rows=self.rows,
        )
        return ForwardBatch(
            token_ids_T=there["token_ids_T"],
            positions_T=there["positions_T"],
            kv_slots_T=there["kv_slots_T"],
            query_starts_R1=self._query_starts_R1,
            context_lens_R=there["context_lens_R"],
            block_tables_RM=there["block_tables_RM"],
            logit_rows_L=self._logit_rows_L,
            lora=None if max_rank == BASE_ONLY else segments,
        )

    def send(self, packed: PackedStep) -> None:
        """Starts the one copy that makes them those of `packed`."""
        self._turn = 1 - self._turn
        buffer, arrays = self._buffers[self._turn], self._arrays[self._turn]
        buffer.wait_until_sent()
        rows, width = packed.block_tables_RM.shape
        lanes_T = np.full(rows, KNOWN, np.int64)
        lanes_T[packed.pending_P] = packed.pending_lanes_P
        _fill(arrays["token_ids_T"], packed.token_ids_T, 0)
        _fill(arrays["token_lanes_T"], lanes_T, KNOWN)
        _fill(arrays["positions_T"], packed.positions_T, 0)
        _fill(arrays["kv_slots_T"], packed.kv_slots_T, NOT_WRITTEN)
        _fill(arrays["context_lens_R"], packed.context_lens_R, 1)
        _fill(arrays["sampled_lanes_S"], packed.sampled_lanes_S, 0)
        _fill_segments(arrays, packed.segments, rows)
        # Blocks past a row's own are those of earlier steps: not read, and valid if they were.
        arrays["block_tables_RM"][:rows, :width] = packed.block_tables_RM
        buffer.send(self._device_bytes[: self._end_of(rows)])

    def _end_of(self, rows: int) -> int:
        """Of what a step of so many rows writes: the tables stand last."""
        tables = self._layout.fields["block_tables_RM"]
        return tables.start + (tables.end - tables.start) // self.rows * rows

    def _send_padding(self) -> None:
        """Before the first step, and what is captured: padding alone."""
        arrays = self._arrays[self._turn]
        arrays["token_lanes_T"].fill(KNOWN)
        arrays["kv_slots_T"].fill(NOT_WRITTEN)
        arrays["context_lens_R"].fill(1)
        arrays["slots_G"].fill(BASE_SLOT)
        self._buffers[self._turn].send(self._device_bytes)


def _fill(target: Array, values: Array, padding: int) -> None:
    target[: len(values)] = values
    target[len(values) :] = padding


def _fill_segments(arrays: dict[str, Array], segments: PackedSegments | None, rows: int) -> None:
    """The step's segments, then empty ones; padding lies past the last."""
    if segments is not None:
        _fill(arrays["starts_G1"], segments.starts_G1, rows)
        _fill(arrays["slots_G"], segments.slots_G, BASE_SLOT)


class DecodeGraphs:
    """Every captured decode step, and the choice among them."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        lane_tokens: Tensor,
        capture: Capture,
        *,
        sizes: Sequence[int],
        max_ranks: Sequence[int],
        max_blocks: int,
    ) -> None:
        """Captures all, the largest first, so that the others find its memory and take no more.

        `sizes` and `max_ranks` ascend (see `padded_rows` and `variants`); `max_blocks` are those
        of the longest sequence.
        """
        self._decoder = decoder
        self._kv = kv
        self._lane_tokens = lane_tokens
        self._sizes = tuple(sizes)
        self._max_ranks = tuple(max_ranks)
        device = lane_tokens.device
        self._inputs = {rows: DecodeInputs(rows, max_blocks, device) for rows in sizes}
        self._graphs = {
            (rows, max_rank): capture(self._run_of(rows, max_rank))
            for rows, max_rank in self._largest_first()
        }

    def __len__(self) -> int:
        return len(self._graphs)

    def inputs_for(self, packed: PackedStep) -> DecodeInputs | None:
        """None: this step must run op by op."""
        if not packed.is_decode or packed.num_rows > self._sizes[-1]:
            return None
        if _max_rank(packed) > self._max_ranks[-1]:
            return None
        return self._inputs[self._sizes[bisect_left(self._sizes, packed.num_rows)]]

    def hidden(self, packed: PackedStep, inputs: DecodeInputs) -> Tensor:
        """hidden_TH of the step's own rows, in their order, until the next replay."""
        inputs.send(packed)
        max_rank = self._max_ranks[bisect_left(self._max_ranks, _max_rank(packed))]
        return self._graphs[inputs.rows, max_rank].replay()[: packed.num_rows]

    def _largest_first(self) -> Iterator[tuple[int, int]]:
        for rows in reversed(self._sizes):
            for max_rank in reversed(self._max_ranks):
                yield rows, max_rank

    def _run_of(self, rows: int, max_rank: int) -> Callable[[], Tensor]:
        inputs = self._inputs[rows]
        batch = inputs.batch(max_rank)

        @torch.inference_mode()
        def run() -> Tensor:
            token_ids_T = self._token_ids(inputs)
            return self._decoder.hidden(replace(batch, token_ids_T=token_ids_T), self._kv)

        return run

    def _token_ids(self, inputs: DecodeInputs) -> Tensor:
        lanes_T = inputs.tensors["token_lanes_T"]
        sampled_T = self._lane_tokens.index_select(0, lanes_T.clamp_min(0))
        return torch.where(lanes_T == KNOWN, inputs.tensors["token_ids_T"], sampled_T)


def _max_rank(packed: PackedStep) -> int:
    """At least 1 where there is an adapted row, even if its adapter changes nothing."""
    return BASE_ONLY if packed.segments is None else max(packed.segments.max_rank, 1)
