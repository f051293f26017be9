"""Is it valid? A PEFT LoRA folder checked against the sites of a base, tensor by tensor.

In: the folder's two open files and the base's geometry. Out: a manifest that says where every
factor of every adapted slice lies, or AdapterInvalidError. It must not know torch, tiers, or
where files come from. Nothing is accepted in part: every tensor has its place, every module that
the configuration selects has its tensors.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import msgspec

from lory_server.adapters.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_RANK,
    AdapterConfig,
    read_config,
)
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.header import (
    TensorSpec,
    read_exactly,
    read_header,
    read_header_bytes,
)
from lory_server.adapters.packed_names import packing_of
from lory_server.model.sites import Site

__all__ = [
    "CHUNK_ALIGN_BYTES",
    "MAX_RANK",
    "AdapterManifest",
    "AdapterSlice",
    "Base",
    "ChunkKind",
    "TensorSpec",
    "read_config",
    "read_header",
    "read_manifest",
]

CHUNK_ALIGN_BYTES = 64
"""Every chunk starts at a multiple of this, on the host and on the device."""

VECTOR_BYTES = 4
"""Gains and biases are float32, whatever the engine's dtype."""

ChunkKind = Literal["a", "b", "gain", "bias"]
"""Numbers that lie together: A, B transposed, and a number for each output."""

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:"
    r"lora_(?P<factor>[AB])(?:\.default)?\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|(?P<b_bias>lora_B)(?:\.default)?\.bias"
    r"|(?P<bias>base_layer\.bias|bias))",
    re.DOTALL,
)
_HUB_CACHE = re.compile(r"(?:^|[/\\])models--(?:[^/\\]+?--)?([^/\\]+)[/\\]snapshots[/\\]")


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

    @property
    def out_features(self) -> int:
        spec = self.b or self.bias
        assert spec is not None
        return spec.shape[0]

    @property
    def needs_base(self) -> bool:
        """Whether its gain or bias takes more than the adapter's own tensors."""
        return self.magnitude is not None or self.bias is not None

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

    @property
    def max_rank(self) -> int:
        return max(part.rank for part in self.slices)

    @property
    def has_gain_or_bias(self) -> bool:
        return any(kind in ("gain", "bias") for part in self.slices for kind, _ in part.chunks())

    @property
    def needs_base(self) -> bool:
        return any(part.needs_base for part in self.slices)

    def chunk_bytes(self, dtype_size: int) -> tuple[int, ...]:
        """Bytes of each chunk, padded so that the next one is aligned."""
        step = CHUNK_ALIGN_BYTES
        sizes = {"a": dtype_size, "b": dtype_size, "gain": VECTOR_BYTES, "bias": VECTOR_BYTES}
        return tuple(
            -(-numel * sizes[kind] // step) * step
            for part in self.slices
            for kind, numel in part.chunks()
        )

    def placed(
        self, chunk_starts: Sequence[int]
    ) -> Iterator[tuple[AdapterSlice, dict[ChunkKind, int]]]:
        """Each slice with where its chunks start, given where all chunks do."""
        starts = iter(chunk_starts)
        for part in self.slices:
            kinds: list[ChunkKind] = [kind for kind, _ in part.chunks()]
            yield part, dict(zip(kinds, islice(starts, len(kinds)), strict=True))

    def num_bytes(self, dtype_size: int) -> int:
        return sum(self.chunk_bytes(dtype_size))


@dataclass(frozen=True, slots=True)
class _Place:
    site: int
    slice: int
    in_features: int
    out_features: int
    has_bias: bool


_Role = Literal["A", "B", "magnitude", "b_bias", "base_layer.bias", "bias"]
_Tensors = dict[_Role, TensorSpec]
"""Of one module."""


def read_manifest(config_fd: int, weights_fd: int, base: Base) -> AdapterManifest:
    """Everything about an adapter but its numbers; raises AdapterInvalidError."""
    raw_config = read_config_bytes(config_fd)
    config = read_config(raw_config)
    _check_base_name(config.base_model_name, base)
    places = {
        part.module: _Place(i, k, site.in_features, part.out_features, site.has_bias)
        for i, site in enumerate(base.sites)
        for k, part in enumerate(site.slices)
    }
    raw_header, file_bytes = read_header_bytes(weights_fd), os.fstat(weights_fd).st_size
    tensors = _by_module(read_header(raw_header, file_bytes), places)
    slices = sorted(_slices(config, tensors, places), key=lambda part: (part.site, part.slice))
    if not any(part.rank for part in slices):
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: target_modules selects no module of the base"
            f" (it has {', '.join(sorted({m.rpartition('.')[2] for m in places}))})"
        )
    invocation = config.invocation_tokens
    if invocation:
        _check_invocation(invocation, slices, base)
    digest = hashlib.sha256(hashlib.sha256(raw_config).digest() + raw_header).digest()
    return AdapterManifest(tuple(slices), config.base_model_name, file_bytes, digest, invocation)


def read_config_bytes(fd: int) -> bytes:
    num_bytes = os.fstat(fd).st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_NAME}: larger than {MAX_CONFIG_BYTES} bytes")
    return read_exactly(fd, num_bytes, 0, CONFIG_NAME)


def _by_module(specs: Sequence[TensorSpec], places: dict[str, _Place]) -> dict[str, _Tensors]:
    """The tensors by module and role; each must belong to a module of the base."""
    found: dict[str, _Tensors] = {}
    for spec in specs:
        match = _TENSOR_NAME.fullmatch(spec.name)
        if match is None:
            raise _invalid(spec.name, "is not of LoRA on a linear layer, and is not served")
        if match["module"] not in places:
            raise _invalid(spec.name, _why_no_place(match, places))
        tensors, role = found.setdefault(match["module"], {}), _role(match)
        if role in tensors:
            raise _invalid(spec.name, "stands twice, with and without an adapter's name")
        tensors[role] = spec
    return found


def _why_no_place(match: re.Match[str], places: dict[str, _Place]) -> str:
    packing = packing_of(match["module"], places)
    if packing:
        return f"is not for this base, which {packing}; train it on the checkpoint that is served"
    what = "a linear" if match["bias"] else "a module"
    return f"is for {what} that the base does not have"


def _role(match: re.Match[str]) -> _Role:
    if match["factor"]:
        return "A" if match["factor"] == "A" else "B"
    if match["bias"]:
        return "bias" if match["bias"] == "bias" else "base_layer.bias"
    return "magnitude" if match["magnitude"] else "b_bias"


def _slices(
    config: AdapterConfig, tensors: dict[str, _Tensors], places: dict[str, _Place]
) -> Iterator[AdapterSlice]:
    for module, place in places.items():
        found, wanted = tensors.get(module, {}), _wanted(config, module, place)
        for role, spec in found.items():
            if role not in wanted:
                raise _invalid(spec.name, _why_not(config, module, place, role))
        for role, name in wanted.items():
            if role not in found:
                name = f"base_model.model.{module}.{name}"
                raise _invalid(name, "is missing, though the configuration asks for it")
        if found:
            yield _slice(config, module, place, found)


def _wanted(config: AdapterConfig, module: str, place: _Place) -> dict[_Role, str]:
    """What PEFT saves for a module: roles, and how names end."""
    trains_bias = place.has_bias and config.bias != "none"
    if not config.is_selected(module):
        return {"bias": "bias"} if trains_bias and config.bias == "all" else {}
    wanted: dict[_Role, str] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    if config.use_dora:
        wanted["magnitude"] = "lora_magnitude_vector"
    if config.lora_bias:
        wanted["b_bias"] = "lora_B.bias"
    if trains_bias:
        wanted["base_layer.bias"] = "base_layer.bias"
    return wanted


def _why_not(config: AdapterConfig, module: str, place: _Place, role: _Role) -> str:
    is_bias = role in ("bias", "base_layer.bias")
    if is_bias and config.bias == "none":
        return "is a trained bias, but the configuration's bias is 'none'"
    if is_bias and not place.has_bias:
        return "is a bias of a linear that has none in the base"
    if role == "bias" and config.is_selected(module):
        return "is the bias of a module with LoRA, where PEFT reads base_layer.bias"
    if not config.is_selected(module) and not (is_bias and config.bias == "lora_only"):
        return "is for a module that target_modules does not select"
    field = {"magnitude": "use_dora", "b_bias": "lora_bias"}.get(role, "bias")
    return f"is not what the configuration's {field} asks for"


def _slice(config: AdapterConfig, module: str, place: _Place, found: _Tensors) -> AdapterSlice:
    rank, scale = config.rank_and_scale(module) if "A" in found else (0, 0.0)
    shapes: dict[_Role, tuple[tuple[int, ...], str]] = {
        "A": ((rank, place.in_features), "[rank, in_features]"),
        "B": ((place.out_features, rank), "[out_features, rank]"),
    }
    for role, spec in found.items():
        expected, meaning = shapes.get(role, ((place.out_features,), "[out_features]"))
        _check_shape(spec, expected, meaning)
    return AdapterSlice(
        place.site,
        place.slice,
        rank,
        scale,
        found.get("A"),
        found.get("B"),
        magnitude=found.get("magnitude"),
        b_bias=found.get("b_bias"),
        bias=found.get("base_layer.bias", found.get("bias")),
        has_base_bias=place.has_bias,
    )


def _check_shape(spec: TensorSpec, expected: tuple[int, ...], meaning: str) -> None:
    if spec.shape != expected:
        raise _invalid(
            spec.name,
            f"has shape {list(spec.shape)}; the configuration and the base make it"
            f" {list(expected)} {meaning}",
        )


def _check_invocation(
    invocation: tuple[int, ...], slices: Sequence[AdapterSlice], base: Base
) -> None:
    """A prompt before the invocation is the base's own: its KV is shared."""
    unknown = next((token for token in invocation if base.vocab_size <= token), None)
    if base.vocab_size and unknown is not None:
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: alora_invocation_tokens has {unknown}, but the base's vocabulary has"
            f" {base.vocab_size} tokens"
        )
    for part in slices:
        if part.bias is not None:
            reason = "acts before the invocation tokens, too; train an aLoRA with bias 'none'"
            raise _invalid(part.bias.name, reason)


# -- the base's name ------------------------------------------------------------------------


def _check_base_name(name: str, base: Base) -> None:
    """Paths differ between machines, so only the last part of names is compared."""
    if not name or not base.names or base.allow_mismatch:
        return
    if _last_part(name) not in {_last_part(known) for known in base.names}:
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: base_model_name_or_path is {name[:200]!r}, but the base served is"
            f" {_last_part(base.names[0])!r}; if they are the same weights, start with"
            " --allow-base-mismatch"
        )


def _last_part(name: str) -> str:
    cached = _HUB_CACHE.search(name)
    if cached:
        return cached[1].lower()
    return re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1].lower()


def _invalid(name: str, reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"tensor {name[:200]!r} {reason}")
