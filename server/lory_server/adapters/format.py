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
from lory_server.model.sites import Site

__all__ = [
    "CHUNK_ALIGN_BYTES",
    "MAX_RANK",
    "AdapterManifest",
    "AdapterSlice",
    "Base",
    "TensorSpec",
    "read_config",
    "read_header",
    "read_manifest",
]

CHUNK_ALIGN_BYTES = 64
"""Every A and every B starts at a multiple of this, on the host and on the device."""

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight", re.DOTALL
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


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """The factors of one slice of one site: A [rank, in_features] and B [out_features, rank]."""

    site: int
    slice: int
    rank: int
    scale: float
    a: TensorSpec
    b: TensorSpec


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A valid adapter, described. Its chunks are A, B, A, B ... in the order of `slices`."""

    slices: tuple[AdapterSlice, ...]
    """In order of site, then slice."""
    base_model_name: str
    file_bytes: int
    """Size of the weights file."""
    digest: bytes
    """Of what has been read to know all this: the configuration, and the weights' header."""

    @property
    def max_rank(self) -> int:
        return max(part.rank for part in self.slices)

    def chunk_numels(self) -> tuple[int, ...]:
        """Elements of each chunk."""
        return tuple(
            spec.shape[0] * spec.shape[1] for part in self.slices for spec in (part.a, part.b)
        )

    def chunk_bytes(self, dtype_size: int) -> tuple[int, ...]:
        """Bytes of each chunk, padded so that the next one is aligned."""
        step = CHUNK_ALIGN_BYTES
        return tuple(-(-numel * dtype_size // step) * step for numel in self.chunk_numels())

    def num_bytes(self, dtype_size: int) -> int:
        return sum(self.chunk_bytes(dtype_size))


@dataclass(frozen=True, slots=True)
class _Place:
    site: int
    slice: int
    in_features: int
    out_features: int


def read_manifest(config_fd: int, weights_fd: int, base: Base) -> AdapterManifest:
    """Everything about an adapter but its numbers; raises AdapterInvalidError."""
    raw_config = read_config_bytes(config_fd)
    config = read_config(raw_config)
    _check_base_name(config.base_model_name, base)
    places = {
        part.module: _Place(i, k, site.in_features, part.out_features)
        for i, site in enumerate(base.sites)
        for k, part in enumerate(site.slices)
    }
    raw_header, file_bytes = read_header_bytes(weights_fd), os.fstat(weights_fd).st_size
    factors = _pair(read_header(raw_header, file_bytes), places)
    slices = sorted(_slices(config, factors, places), key=lambda part: (part.site, part.slice))
    if not slices:
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: target_modules selects no module of the base"
            f" (it has {', '.join(sorted({m.rpartition('.')[2] for m in places}))})"
        )
    digest = hashlib.sha256(hashlib.sha256(raw_config).digest() + raw_header).digest()
    return AdapterManifest(tuple(slices), config.base_model_name, file_bytes, digest)


def read_config_bytes(fd: int) -> bytes:
    num_bytes = os.fstat(fd).st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_NAME}: larger than {MAX_CONFIG_BYTES} bytes")
    return read_exactly(fd, num_bytes, 0, CONFIG_NAME)


def _pair(
    specs: Sequence[TensorSpec], places: dict[str, _Place]
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors by module and factor; each must belong to a module of the base."""
    factors: dict[str, dict[str, TensorSpec]] = {}
    for spec in specs:
        match = _TENSOR_NAME.fullmatch(spec.name)
        if match is None:
            raise _invalid(spec.name, "is not a LoRA factor of a linear layer, and is not served")
        if match["module"] not in places:
            raise _invalid(spec.name, "is for a module that the base does not have")
        pair = factors.setdefault(match["module"], {})
        if match["factor"] in pair:
            raise _invalid(spec.name, "stands twice, with and without an adapter's name")
        pair[match["factor"]] = spec
    return factors


def _slices(
    config: AdapterConfig,
    factors: dict[str, dict[str, TensorSpec]],
    places: dict[str, _Place],
) -> Iterator[AdapterSlice]:
    for module, place in places.items():
        pair = factors.get(module, {})
        if not config.is_selected(module):
            if pair:
                name = next(iter(pair.values())).name
                raise _invalid(name, "is for a module that target_modules does not select")
            continue
        for factor in "AB":
            if factor not in pair:
                name = f"base_model.model.{module}.lora_{factor}.weight"
                raise _invalid(name, "is missing, though target_modules selects its module")
        rank, scale = config.rank_and_scale(module)
        _check_shape(pair["A"], (rank, place.in_features), "[rank, in_features]")
        _check_shape(pair["B"], (place.out_features, rank), "[out_features, rank]")
        yield AdapterSlice(place.site, place.slice, rank, scale, pair["A"], pair["B"])


def _check_shape(spec: TensorSpec, expected: tuple[int, int], meaning: str) -> None:
    if spec.shape != expected:
        raise _invalid(
            spec.name,
            f"has shape {list(spec.shape)}; the configuration and the base make it"
            f" {list(expected)} {meaning}",
        )


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
