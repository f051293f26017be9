"""The vocabulary inside the engine: what a step computes, and what came of it.

A plan is a plain value made by the scheduler; the runner turns it into tensors and back into a
result. This module must not know torch, HTTP, or where anything is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lory_server.messages import Sampling

BASE_SLOT = -1
"""The slot of rows that use no adapter."""

PENDING = -1
"""A token that has been sampled on the device but not seen by the host yet."""

INVALID_TOKEN = -2
"""Sampled where the logits were not finite: the sequence fails, alone."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How the token after a row's last position is chosen."""

    sampling: Sampling
    position: int
    """Position the new token will have in its sequence; with the seed it fixes the draw."""
    history: Sequence[int] | None = None
    """All tokens before it, prompt first, if a penalty needs them; else None."""
    prompt_len: int = 0


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A run of consecutive positions of one sequence, computed in one step.

        tokens of the sequence: [ 0 ......... start | start .. start+len(token_ids) ) ...
                                  KV already there    computed by this row

    `token_ids` ends in PENDING when the last token is still on the device, in `lane`.
    """

    sequence_id: int
    lane: int
    """The sequence's place in device buffers while it runs, 0 <= lane < max_batch_rows. Two rows
    of a step share one where a sequence's adapter begins to act: the second goes on from the
    first."""
    start: int
    token_ids: Sequence[int]
    blocks: Sequence[int]
    """Block table that covers [0, start + len(token_ids))."""
    slot: int
    """Adapter slot on the device, or BASE_SLOT."""
    sample: SampleRow | None
    """None: a chunk of prefill that ends before the prompt does."""
    rank: int = 0
    """The adapter's largest rank."""
    has_gain_or_bias: bool = False
    """Whether the adapter does more to any output than to add x A B."""
    rope_offset: int = 0
    """What is added to a position for its row in the table of rotations."""
    targets: Sequence[int] = ()
    """Prompt tokens whose log-probabilities are wanted: targets[i] follows position start + i."""
    num_target_top: int = 0
    """Alternatives wanted beside each."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a packed batch."""

    step: int
    rows: tuple[PlanRow, ...]
    needs_host_tokens: bool = False
    """The next plan cannot be made before this one's tokens are seen."""

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token with its probability: one that was drawn, or one of the prompt that was scored."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan computed, row by row in the plan's order."""

    sampled: tuple[SampledToken | None, ...]
    """None for rows that sample nothing."""
    scored: tuple[tuple[SampledToken, ...], ...] = ()
    """Per row, its targets; empty as a whole when no row has any."""


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    slot: int
    num_bytes: int
    max_rank: int
    has_gain_or_bias: bool = False
    full_bytes: int = 0
    """Of weights in place of the base's, beside `num_bytes`."""


@dataclass(frozen=True, slots=True)
class Residency:
    """A frozen picture of the device tier, taken before planning."""

    resident: Mapping[str, ResidentAdapter] = field(default_factory=dict)
    """By revision."""
    loading: frozenset[str] = frozenset()
    free_bytes: int = 0
    free_slots: int = 0
    free_full_bytes: int = 0


@dataclass(frozen=True, slots=True)
class AdapterDemand:
    """What the scheduler asks of the device tier, beside each plan."""

    in_use: frozenset[str]
    """Revisions that running or in-flight rows use: never evicted."""
    wanted: tuple[str, ...]
    """Revisions that waiting sequences need, first in line first, resident ones among them: such
    a one makes room for those before it at the last, and for nobody behind it."""
