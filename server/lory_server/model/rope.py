"""Rotary position embedding as one table of cosines and sines.

The inverse frequencies come from transformers, so that every kind of scaling means what it means
there; kinds that depend on the sequence length are fixed once, by the context the engine serves:

    dynamic   frequencies of a sequence of max(max_model_len, max_position_embeddings) tokens: the
              plain ones unless the engine is asked for more than the base's own limit
    longrope  the long factors if max_model_len > original_max_position_embeddings, else the short

transformers chooses by the length each sequence has so far, and so rotates keys of one sequence
in two ways; KV that is shared between sequences cannot. Legend: P positions, D rotary dimension.
This module must not know any model family.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lory_server.model.spec import RopeSpec

if TYPE_CHECKING:
    from transformers import LlamaConfig


def rope_table(rope: RopeSpec, max_model_len: int, device: torch.device | str) -> Tensor:
    """[P, D] float32: cosines in the first half of each row, sines in the second."""
    inverse_frequencies, attention_factor = _inverse_frequencies(rope, max_model_len)
    positions_P = torch.arange(max_model_len, dtype=torch.float32)
    angles_PD = torch.outer(positions_P, inverse_frequencies)
    table_PD = torch.cat((angles_PD.cos(), angles_PD.sin()), dim=-1) * attention_factor
    return table_PD.contiguous().to(device)


def _inverse_frequencies(rope: RopeSpec, max_model_len: int) -> tuple[Tensor, float]:
    if rope.kind == "default":
        exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
        return 1.0 / (rope.parameters["rope_theta"] ** exponents), 1.0
    # Imported where it is needed: transformers takes seconds to start.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute = ROPE_INIT_FUNCTIONS[rope.kind]
    frequencies, attention_factor = compute(
        _as_config(rope), torch.device("cpu"), seq_len=max_model_len
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
