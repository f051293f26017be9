"""Is it valid? A PEFT LoRA folder checked against the sites of a base, tensor by tensor.

In: the folder's two open files and the base's geometry. Out: a manifest that says where every
factor of every adapted slice lies, or AdapterInvalidError. It must not know torch, tiers, or
where files come from. Nothing is accepted in part: every tensor has its place, every module that
the configuration selects has its tensors.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

from lory_server.adapters.config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_RANK,
    AdapterConfig,
    read_config,
)
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.full_format import (
    drop_copies,
    is_adapted,
    is_tied,
    own_vocab_size,
    take_full_weights,
)
from lory_server.adapters.header import TensorSpec, read_exactly, read_header, read_header_bytes
from lory_server.adapters.manifest import AdapterManifest, AdapterSlice, Base, FullWeight
from lory_server.adapters.tensors import Role, Tensors, by_module, check_shape, invalid
from lory_server.adapters.tokenizer_files import TOKENIZER_NAME, check_runnable, read_tokenizer
from lory_server.model.sites import EMBEDDING_MODULE, HEAD_MODULE

__all__ = [
    "MAX_RANK",
    "AdapterManifest",
    "AdapterSlice",
    "Base",
    "TensorSpec",
    "read_config",
    "read_header",
    "read_manifest",
]

_HUB_CACHE = "models--"


@dataclass(frozen=True, slots=True)
class _Place:
    site: int
    slice: int
    in_features: int
    out_features: int
    has_bias: bool
    is_lookup: bool
    is_adapted: bool
    """By the configuration: it has LoRA."""
    factors_of: str
    """The module whose rank its factors have."""


NO_FILES: Mapping[str, int] = MappingProxyType({})


def read_manifest(
    config_fd: int, weights_fd: int, base: Base, tokenizer_fds: Mapping[str, int] = NO_FILES
) -> AdapterManifest:
    """Everything about an adapter but its numbers; raises AdapterInvalidError."""
    raw_config = read_config_bytes(config_fd)
    config = read_config(raw_config)
    _check_base_name(config.base_model_name, base)
    places = {
        part.module: _place(config, base, i, k)
        for i, site in enumerate(base.sites)
        for k, part in enumerate(site.slices)
    }
    raw_header, file_bytes = read_header_bytes(weights_fd), os.fstat(weights_fd).st_size
    modules = {*places, *(module for module, _ in base.norms)}
    tensors = by_module(read_header(raw_header, file_bytes), modules)
    drop_copies(tensors)
    vocab_size = own_vocab_size(tensors, base, has_tokenizer=bool(tokenizer_fds))
    full = take_full_weights(config, tensors, base, vocab_size)
    slices = sorted(_slices(config, tensors, places), key=lambda part: (part.site, part.slice))
    if not any(part.rank for part in slices):
        raise AdapterInvalidError(
            f"{CONFIG_NAME}: target_modules selects no module of the base"
            f" (it has {', '.join(sorted({m.rpartition('.')[2] for m in places}))})"
        )
    invocation = config.invocation_tokens
    if invocation:
        _check_invocation(invocation, slices, full, base)
    digest = hashlib.sha256(hashlib.sha256(raw_config).digest() + raw_header).digest()
    tokenizer = _own_tokenizer(tokenizer_fds, vocab_size, base)
    return AdapterManifest(
        tuple(slices),
        config.base_model_name,
        file_bytes,
        digest,
        invocation,
        full,
        tokenizer,
        vocab_size,
    )


def _own_tokenizer(descriptors: Mapping[str, int], vocab_size: int, base: Base) -> str:
    """Its digest; empty where it is the base's, or there is none."""
    if not descriptors:
        return ""
    files = read_tokenizer(descriptors)
    check_runnable(files, base.tokenizer)
    # Beside the base's ends it may well name more, a token to pad with above all: as elsewhere
    # that is an error of the text that needs one, not of the adapter.
    if vocab_size and files.num_tokens > vocab_size:
        raise AdapterInvalidError(
            f"{TOKENIZER_NAME}: has a token {files.num_tokens - 1}, the adapter's own embedding has"
            f" {vocab_size} tokens; resize_token_embeddings before training"
        )
    is_own = vocab_size or base.tokenizer is None or not files.repeats(base.tokenizer)
    return files.digest if is_own else ""


def _place(config: AdapterConfig, base: Base, number: int, part: int) -> _Place:
    site = base.sites[number]
    of = site.slices[part]
    is_lookup = of.module == EMBEDDING_MODULE
    ties = of.module == HEAD_MODULE and is_tied(config, base)
    return _Place(
        number,
        part,
        site.in_features,
        of.out_features,
        site.has_bias,
        is_lookup,
        is_adapted(config, of.module, base),
        factors_of=EMBEDDING_MODULE if ties else of.module,
    )


def read_config_bytes(fd: int) -> bytes:
    num_bytes = os.fstat(fd).st_size
    if num_bytes > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(f"{CONFIG_NAME}: larger than {MAX_CONFIG_BYTES} bytes")
    return read_exactly(fd, num_bytes, 0, CONFIG_NAME)


def _slices(
    config: AdapterConfig, tensors: dict[str, Tensors], places: dict[str, _Place]
) -> Iterator[AdapterSlice]:
    for module, place in places.items():
        found, wanted = tensors.get(module, {}), _wanted(config, module, place)
        for role, spec in found.items():
            if role not in wanted:
                raise invalid(spec.name, _why_not(config, module, place, role))
        for role, name in wanted.items():
            if role not in found:
                name = f"base_model.model.{module}.{name}"
                raise invalid(name, "is missing, though the configuration asks for it")
        if found:
            yield _slice(config, module, place, found)


def _wanted(config: AdapterConfig, module: str, place: _Place) -> dict[Role, str]:
    """What PEFT saves for a module: roles, and how names end."""
    trains_bias = place.has_bias and config.bias != "none"
    if not place.is_adapted:
        return {"bias": "bias"} if trains_bias and config.bias == "all" else {}
    wanted: dict[Role, str] = {"A": "lora_A.weight", "B": "lora_B.weight"}
    if place.is_lookup:
        wanted = {"embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B"}
    if config.use_dora:
        wanted["magnitude"] = "lora_magnitude_vector"
    if config.lora_bias:
        wanted["b_bias"] = "lora_B.bias"
    if trains_bias:
        wanted["base_layer.bias"] = "base_layer.bias"
    return wanted


def _why_not(config: AdapterConfig, module: str, place: _Place, role: Role) -> str:
    is_bias = role in ("bias", "base_layer.bias")
    if is_bias and config.bias == "none":
        return "is a trained bias, but the configuration's bias is 'none'"
    if is_bias and not place.has_bias:
        return "is a bias of a linear that has none in the base"
    if role == "bias" and place.is_adapted:
        return "is the bias of a module with LoRA, where PEFT reads base_layer.bias"
    if not place.is_adapted and not (is_bias and config.bias == "lora_only"):
        return "is for a module that target_modules does not select"
    if role in ("A", "B", "embedding_A", "embedding_B"):
        names = "lora_embedding_A and lora_embedding_B" if place.is_lookup else "lora_A and lora_B"
        return f"is not how PEFT calls the factors here: {names}"
    field = {"magnitude": "use_dora", "b_bias": "lora_bias"}.get(role, "bias")
    return f"is not what the configuration's {field} asks for"


def _slice(config: AdapterConfig, module: str, place: _Place, found: Tensors) -> AdapterSlice:
    a, b = (found.get("A"), found.get("B"))
    if place.is_lookup:
        a, b = (found.get("embedding_A"), found.get("embedding_B"))
    rank, scale = (0, 0.0) if a is None else config.rank_and_scale(module)
    if a is not None:
        rank, _ = config.rank_and_scale(place.factors_of)
    of_a = ((rank, place.in_features), "[rank, in_features]")
    of_b = ((place.out_features, rank), "[out_features, rank]")
    shapes: dict[Role, tuple[tuple[int, ...], str]] = {
        "A": of_a,
        "embedding_A": of_a,
        "B": of_b,
        "embedding_B": of_b,
    }
    for role, spec in found.items():
        expected, meaning = shapes.get(role, ((place.out_features,), "[out_features]"))
        check_shape(spec, expected, meaning)
    return AdapterSlice(
        place.site,
        place.slice,
        rank,
        scale,
        a,
        b,
        magnitude=found.get("magnitude"),
        b_bias=found.get("b_bias"),
        bias=found.get("base_layer.bias", found.get("bias")),
        has_base_bias=place.has_bias,
        is_lookup=place.is_lookup,
        is_head=module == HEAD_MODULE,
    )


def _check_invocation(
    invocation: tuple[int, ...],
    slices: Sequence[AdapterSlice],
    full: Sequence[FullWeight],
    base: Base,
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
            raise invalid(part.bias.name, reason)
        if part.is_lookup and part.a is not None:
            reason = "acts before the invocation tokens, too; leave embed_tokens out of an aLoRA"
            raise invalid(part.a.name, reason)
    for weight in full:
        if not weight.may_be_base:
            reason = "acts before the invocation tokens, too; train an aLoRA without it"
            raise invalid(weight.spec.name, reason)


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
    """Of a path into a hub's cache, models--org--name/snapshots/..., the name."""
    parts = re.split(r"[/\\]", name.strip().rstrip("/\\"))
    for cached, inner in pairwise(parts):
        if inner == "snapshots" and cached.startswith(_HUB_CACHE):
            repo = cached.removeprefix(_HUB_CACHE)
            return (repo.partition("--")[2] or repo).lower()
    return parts[-1].lower()
