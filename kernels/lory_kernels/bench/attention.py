"""Cases of paged attention: rows that decode, and whole prompts.

Blocks of a row lie in a shuffled order. It must not know how calls are timed. Legend in
contract.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lory_kernels.bench.case import Case, Label, Place, Run
from lory_kernels.bench.shapes import ModelShape
from lory_kernels.contract import Ops
from lory_kernels.reference import TorchOps

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    qkv_TN: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables_RM: Tensor
    query_starts_R1: Tensor
    context_lens_R: Tensor
    out_TN: Tensor
    model: ModelShape


def decode_case(place: Place, model: ModelShape, batch: int, context: int) -> Case:
    """`batch` rows that compute the last position of a context each."""
    label = Label("attention", f"{model.name} decode, context {context}", batch)
    return _case(place, model, label, [1] * batch, context)


def prefill_case(place: Place, model: ModelShape, tokens: int) -> Case:
    """One prompt, whole."""
    label = Label("attention", f"{model.name} prefill of {tokens}", tokens)
    return _case(place, model, label, [tokens], tokens)


def _case(
    place: Place, model: ModelShape, label: Label, queries: Sequence[int], context: int
) -> Case[AttentionInputs]:
    seen = sum(count * context - count * (count - 1) // 2 for count in queries)
    activations = 2 * sum(queries) * model.hidden
    cache = 2 * len(queries) * context * model.kv_width
    return Case(
        label,
        place.dtype,
        make_inputs=lambda: _inputs(place, model, queries, context),
        expected=lambda inputs: _bind(TorchOps(), inputs)(),
        spoiled=_with_rolled_values,
        contenders=tuple(place.contenders(_bind, reference_waits=True)),
        num_bytes=(cache + activations) * place.itemsize,
        flops=4 * seen * model.hidden,
    )


def _inputs(
    place: Place, model: ModelShape, queries: Sequence[int], context: int
) -> AttentionInputs:
    blocks_a_row = -(-context // BLOCK_SIZE)
    num_blocks = blocks_a_row * len(queries)
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    pages = (num_blocks, model.kv_heads, BLOCK_SIZE, model.head_dim)
    tokens = sum(queries)
    starts = torch.tensor([0, *queries]).cumsum(0)
    return AttentionInputs(
        qkv_TN=place.normal(tokens, model.hidden + 2 * model.kv_width),
        k_cache=place.normal(*pages),
        v_cache=place.normal(*pages),
        block_tables_RM=place.integers(shuffled.view(len(queries), -1), torch.int32),
        query_starts_R1=place.integers(starts, torch.int32),
        context_lens_R=place.integers([context] * len(queries), torch.int32),
        out_TN=torch.zeros((tokens, model.hidden), dtype=place.dtype, device=place.device),
        model=model,
    )


def _bind(ops: Ops, inputs: AttentionInputs) -> Run:
    model = inputs.model

    def run() -> tuple[Tensor, ...]:
        ops.paged_attention(
            inputs.qkv_TN,
            inputs.k_cache,
            inputs.v_cache,
            inputs.block_tables_RM,
            inputs.query_starts_R1,
            inputs.context_lens_R,
            inputs.out_TN,
            model.heads,
            model.kv_heads,
            model.head_dim,
            model.head_dim**-0.5,
        )
        return (inputs.out_TN,)

    return run


def _with_rolled_values(inputs: AttentionInputs) -> AttentionInputs:
    """Every value stands one position further on in its block."""
    return replace(inputs, v_cache=inputs.v_cache.roll(1, 2))
