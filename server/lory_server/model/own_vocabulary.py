"""Rows whose adapter has a vocabulary of another size than the base's.

    logits over the base's vocabulary    | base | a | wide ... | b |     of `wide` nobody reads them
    over its own, a piece at a time                | wide |

The step samples and scores all rows over the base's vocabulary, so that what the others get does
not depend on how wide their neighbours are; then these rows by themselves, over what is written
first. A piece has no more numbers than the memory plan counts for a whole step. This module must
not know plans, slots or where weights come from.

Legend: L rows with logits, P rows of a piece, V tokens of the base, W of an adapter, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lory_server.messages import Sampling
from lory_server.model.ends import Run
from lory_server.model.sampler import Samples
from lory_server.plan import SampleRow


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows side by side, all sampled or all scored."""

    rows: slice
    head_WH: Tensor


def wide_pieces(runs: Sequence[Run], num_sampled: int, num_rows: int, width: int) -> list[Piece]:
    """Of all logit rows of a step, the first `num_sampled` of which are sampled; `width`: V."""
    return [
        Piece(rows, head_WH)
        for run in runs
        if (head_WH := run.ends.head_VH if run.ends else None) is not None
        and head_WH.shape[0] != width
        for rows in _cut(run, num_sampled, max(1, num_rows * width // head_WH.shape[0]))
    ]


def _cut(run: Run, num_sampled: int, most: int) -> Iterator[slice]:
    start = run.start
    while start < run.stop:
        end = num_sampled if start < num_sampled else run.stop
        stop = min(run.stop, end, start + most)
        yield slice(start, stop)
        start = stop


def narrow_rows(rows: Sequence[SampleRow], pieces: Sequence[Piece]) -> Sequence[SampleRow]:
    """The rows as they are sampled over the base's vocabulary: of wide ones nothing is asked that
    has to do with tokens."""
    if not pieces:
        return rows
    narrow = list(rows)
    for piece in pieces:
        for i in range(piece.rows.start, min(piece.rows.stop, len(narrow))):
            tops = rows[i].sampling.num_top_logprobs
            plain = Sampling(max_new_tokens=1, seed=0, num_top_logprobs=tops)
            narrow[i] = replace(rows[i], sampling=plain, history=None)
    return narrow


def put(samples: Samples, start: int, own: Samples) -> None:
    """What a piece got, in place of what stands from row `start` on."""
    rows = slice(start, start + own.token_ids_S.shape[0])
    samples.token_ids_S[rows] = own.token_ids_S
    samples.logprobs_S[rows] = own.logprobs_S
    if own.top_ids_SK is not None and own.top_logprobs_SK is not None:
        assert samples.top_ids_SK is not None
        assert samples.top_logprobs_SK is not None
        num_top = own.top_ids_SK.shape[1]
        samples.top_ids_SK[rows, :num_top] = own.top_ids_SK
        samples.top_logprobs_SK[rows, :num_top] = own.top_logprobs_SK
