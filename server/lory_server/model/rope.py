"""Rotary position embedding as one table of cosines and sines.

The inverse frequencies come from transformers, so that every kind of scaling means what it means
there. Two kinds depend on the length that a sequence has so far:

    longrope  short factors up to original_max_position_embeddings tokens, long ones beyond: the
              table has the rows of both, and a sequence that grows from one into the other is
              computed anew, as transformers does for Phi-3
    dynamic   other frequencies at every length beyond max_position_embeddings: fixed to those of
              max_model_len, so the plain ones unless the engine is asked for more than that

Legend: P rows, one a position and kind; D rotary dimension. This module must not know any model
family.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lory_server.model.spec import RopeSpec

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True, slots=True)
class RopeTable:
    rows_PD: Tensor
    """float32: cosines in the first half of each row, sines in the second."""
    short_tokens: int = 0
    """Rows of sequences of so many tokens at most; those of longer ones follow. 0: of all."""

    @property
    def max_model_len(self) -> int:
        return self.rows_PD.shape[0] - self.short_tokens


def rope_table(rope: RopeSpec, max_model_len: int, device: torch.device | str) -> RopeTable:
    short = rope.short_tokens
    if not 0 < short < max_model_len:
        return RopeTable(_rows(rope, max_model_len, device))
    rows_PD = torch.cat((_rows(rope, short, device), _rows(rope, max_model_len, device)))
    return RopeTable(rows_PD, short)


def _rows(rope: RopeSpec, num_tokens: int, device: torch.device | str) -> Tensor:
    """Of a sequence of so many tokens."""
    inverse_frequencies, attention_factor = _inverse_frequencies(rope, num_tokens)
    positions_P = torch.arange(num_tokens, dtype=torch.float32)
    angles_PD = torch.outer(positions_P, inverse_frequencies)
    rows_PD = torch.cat((angles_PD.cos(), angles_PD.sin()), dim=-1) * attention_factor
    return rows_PD.contiguous().to(device)


def _inverse_frequencies(rope: RopeSpec, num_tokens: int) -> tuple[Tensor, float]:
    if rope.kind == "default":
        exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
        return 1.0 / (rope.parameters["rope_theta"] ** exponents), 1.0
    # Imported where it is needed: transformers takes seconds to start.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute = ROPE_INIT_FUNCTIONS[rope.kind]
    frequencies, attention_factor = compute(
        _as_config(rope), torch.device("cpu"), seq_len=num_tokens
    )
    return frequencies, float(attention_factor)


def _as_config(rope: RopeSpec) -> "LlamaConfig":
    """A configuration of one rotated head, which is all the frequencies are computed from."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=rope.rotary_dim,
        num_attention_heads=1,
        head_dim=rope.rotary_dim,
        max_position_embeddings=rope.max_positions,
        rope_parameters=dict(rope.parameters) | {"partial_rotary_factor": 1.0},
    )
