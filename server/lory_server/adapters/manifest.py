"""A valid adapter, described: which numbers it has, where they lie in its file, how many bytes
they take.

    pool          | A, B, gain, bias of slice 0 | of slice 1 | ...      sites: LoRA, embedding's too
    full weights  | embedding | head | rows of tokens | norms | ...

Made by `format`, used by everything after it. It must not know torch, tiers, or how a file is read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Literal

import msgspec

from lory_server.adapters.header import TensorSpec
from lory_server.adapters.tokenizer_files import TokenizerFiles
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE, Site

CHUNK_ALIGN_BYTES = 64
"""Every chunk starts at a multiple of this, on the host and on the device."""

VECTOR_BYTES = 4
"""Gains and biases are float32, whatever the engine's dtype."""

ChunkKind = Literal["a", "b", "gain", "bias"]
"""Numbers that lie together: A, B transposed, and a number for each output."""


@dataclass(frozen=True, slots=True)
class Base:
    """What an adapter must fit."""

    sites: tuple[Site, ...]
    names: tuple[str, ...] = ()
    """Names and paths the base is known by; empty: any name in a configuration is accepted."""
    allow_mismatch: bool = False
    """Accept configurations that name another base, if every tensor fits."""
    vocab_size: int = 0
    """0: not known."""
    norms: tuple[tuple[str, int], ...] = ()
    """Modules and sizes of its norms."""
    tied_head: bool = False
    """Its head is its embedding."""
    tokenizer: TokenizerFiles | None = None
    """What adapters' tokenizers are compared with; None: nothing."""


class AdapterSlice(msgspec.Struct, frozen=True, gc=False):
    """What an adapter has for one slice of one site: A [rank, in_features] and B [out_features,
    rank], or neither, and tensors of [out_features]."""

    site: int
    slice: int
    rank: int
    """0: no factors, but a bias."""
    scale: float
    a: TensorSpec | None
    b: TensorSpec | None
    magnitude: TensorSpec | None = None
    """Of DoRA: the norm of each output's weights."""
    b_bias: TensorSpec | None = None
    """Added to x A B before it is scaled."""
    bias: TensorSpec | None = None
    """In place of the base's."""
    has_base_bias: bool = False
    is_lookup: bool = False
    """Of the embedding: a token takes one column of A, so A lies transposed."""
    is_head: bool = False
    """Of the head: it acts on rows of logits alone."""

    @property
    def out_features(self) -> int:
        spec = self.b or self.bias
        assert spec is not None
        return spec.shape[0]

    @property
    def needs_base(self) -> bool:
        """Whether its gain or bias takes more than the adapter's own tensors."""
        return self.magnitude is not None or self.bias is not None

    @property
    def work_params(self) -> int:
        """How many of its numbers a token that it acts on takes."""
        passed_over = self.a.shape[0] * (self.a.shape[1] - 1) if self.is_lookup and self.a else 0
        return sum(numel for _, numel in self.chunks()) - passed_over

    def chunks(self) -> Iterator[tuple[ChunkKind, int]]:
        """What it takes in the pool, in order: kinds, and how many numbers."""
        if self.a is not None:
            yield "a", self.a.shape[0] * self.a.shape[1]
        if self.b is not None:
            yield "b", self.b.shape[0] * self.b.shape[1]
        if self.magnitude is not None:
            yield "gain", self.out_features
        # A gain is not for the base's bias, which the base has added already: a bias undoes that.
        if self.b_bias or self.bias or (self.magnitude and self.has_base_bias):
            yield "bias", self.out_features


@dataclass(frozen=True, slots=True)
class FullWeight:
    """A weight of the adapter's own in place of one of the base's: all of it, or rows of it."""

    module: str
    """Embedding, head, or a norm."""
    spec: TensorSpec
    token_ids: tuple[int, ...] = ()
    """The rows it is in place of; empty: all."""
    is_tied: bool = False
    """Of embedding or head: it is both."""
    may_be_base: bool = False
    """PEFT saved it beside LoRA on the same module, trained or not; `fold` drops the base's own."""

    @property
    def numel(self) -> int:
        return prod(self.spec.shape)


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A valid adapter, described. Its chunks are those of its slices, slice after slice."""

    slices: tuple[AdapterSlice, ...]
    """In order of site, then slice."""
    base_model_name: str
    file_bytes: int
    """Size of the weights file."""
    digest: bytes
    """Of what has been read to know all this: the configuration, and the weights' header."""
    invocation_tokens: tuple[int, ...] = ()
    """It acts where these last begin in a prompt, and from there on; empty: everywhere."""
    full: tuple[FullWeight, ...] = ()
    tokenizer: str = ""
    """Digest of its own; empty: it brings none, or the base's."""
    vocab_size: int = 0
    """Of its own embedding and head; 0: as many tokens as the base has."""

    @property
    def max_rank(self) -> int:
        return max(part.rank for part in self.slices)

    @property
    def has_gain_or_bias(self) -> bool:
        return any(kind in ("gain", "bias") for part in self.slices for kind, _ in part.chunks())

    @property
    def needs_base(self) -> bool:
        """Whether `fold` has anything to do."""
        ends = [weight for weight in self.full if is_end(weight.module) and not weight.token_ids]
        may_repeat = len(ends) > 1 or any(weight.may_be_base for weight in ends)
        return may_repeat or any(part.needs_base for part in self.slices)

    @property
    def has_own_head(self) -> bool:
        """Whether its logits take a product with a head of its own."""
        return any(
            not weight.token_ids and (weight.module == HEAD_MODULE or weight.is_tied)
            for weight in self.full
        )

    @property
    def token_params(self) -> int:
        """What each token takes a product with beside the base's."""
        return sum(part.work_params for part in self.slices if not part.is_head)

    @property
    def head_params(self) -> int:
        """Of the head, the rows of one, and the factors on one, that its logits take a product with
        beside the base's. A head of its own goes before a tied embedding, which it follows."""
        of_head = (weight for weight in self.full if weight.module == HEAD_MODULE or weight.is_tied)
        full = {bool(weight.token_ids): weight.numel for weight in of_head}
        factors = (part.work_params for part in self.slices if part.is_head)
        return sum(full.values()) + sum(factors)

    def chunk_bytes(self, dtype_size: int) -> tuple[int, ...]:
        """Bytes of each chunk in the pool, padded so that the next one is aligned."""
        sizes = {"a": dtype_size, "b": dtype_size, "gain": VECTOR_BYTES, "bias": VECTOR_BYTES}
        return tuple(
            _aligned(numel * sizes[kind]) for part in self.slices for kind, numel in part.chunks()
        )

    def full_bytes(self, dtype_size: int) -> tuple[int, ...]:
        """Bytes of each full weight, padded likewise; on the host they follow the chunks."""
        return tuple(_aligned(weight.numel * dtype_size) for weight in self.full)

    def placed(
        self, chunk_starts: Sequence[int]
    ) -> Iterator[tuple[AdapterSlice, dict[ChunkKind, int]]]:
        """Each slice with where its chunks start, given where all chunks do."""
        starts = iter(chunk_starts)
        for part in self.slices:
            kinds: list[ChunkKind] = [kind for kind, _ in part.chunks()]
            yield part, dict(zip(kinds, islice(starts, len(kinds)), strict=True))

    def pool_bytes(self, dtype_size: int) -> int:
        return sum(self.chunk_bytes(dtype_size))

    def num_bytes(self, dtype_size: int) -> int:
        """All that it takes on the host."""
        return self.pool_bytes(dtype_size) + sum(self.full_bytes(dtype_size))


def is_end(module: str) -> bool:
    """Whether a module is the embedding or the head."""
    return module in (EMBEDDING_MODULE, HEAD_MODULE)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // CHUNK_ALIGN_BYTES) * CHUNK_ALIGN_BYTES
