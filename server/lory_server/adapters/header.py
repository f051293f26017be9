"""A safetensors file's header, read by us under hard limits.

In: an open file, then its header's bytes. Out: where each tensor lies. Nothing is allocated from a
number in the file before that number has been checked. It must not know adapters, models or torch.
"""

import math
import os
from typing import Any

import msgspec

from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.strict_json import parse_object

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_TENSORS = 16_384
MAX_NAME_CHARS = 512
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_LENGTH_BYTES = 8
_LFS_POINTER = b"version "
"""How it begins; as a length it would be exabytes."""
_MAX_DIM = 2**31
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """Thousands of adapters have hundreds each: the collector must not walk them."""

    name: str
    dtype: str
    """A key of DTYPE_BYTES."""
    shape: tuple[int, ...]
    offset: int
    """In bytes from the start of the file."""
    num_bytes: int


def read_exactly(fd: int, num_bytes: int, offset: int, what: str) -> bytes:
    """`num_bytes` at `offset`, or AdapterInvalidError if the file ends before."""
    parts: list[bytes] = []
    while num_bytes:
        part = os.pread(fd, num_bytes, offset)
        if not part:
            raise AdapterInvalidError(f"{what}: the file is truncated")
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def read_header_bytes(fd: int) -> bytes:
    """The header with the length before it."""
    length = read_exactly(fd, _LENGTH_BYTES, 0, WEIGHTS_NAME)
    if length == _LFS_POINTER:
        raise _invalid("the file is a pointer of Git LFS; fetch what it stands for: git lfs pull")
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _invalid(
            f"the header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read;"
            " is this really a safetensors file?"
        )
    if _LENGTH_BYTES + header_bytes > os.fstat(fd).st_size:
        raise _invalid("the file is truncated")
    return length + read_exactly(fd, header_bytes, _LENGTH_BYTES, WEIGHTS_NAME)


def read_header(raw: bytes, file_bytes: int) -> tuple[TensorSpec, ...]:
    """The tensors in file order; together they cover the file to its last byte."""
    header = parse_object(raw[_LENGTH_BYTES:], f"{WEIGHTS_NAME} header")
    specs = _specs(header, len(raw))
    _check_cover(specs, len(raw), file_bytes)
    return specs


def _specs(header: dict[str, Any], data_start: int) -> tuple[TensorSpec, ...]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _invalid("__metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise _invalid(f"{len(header)} tensors, at most {MAX_TENSORS} are read")
    specs = (_spec(name, entry, data_start) for name, entry in header.items())
    return tuple(sorted(specs, key=lambda spec: (spec.offset, spec.num_bytes)))


def _spec(name: str, entry: object, data_start: int) -> TensorSpec:
    if len(name) > MAX_NAME_CHARS:
        raise _invalid(f"a tensor name of {len(name)} characters, at most {MAX_NAME_CHARS}")
    if not isinstance(entry, dict) or set(entry) != _ENTRY_KEYS:
        raise _invalid(f"tensor {name!r}: dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _invalid(
            f"tensor {name!r} has dtype {str(dtype)[:20]!r}; save it as one of"
            f" {', '.join(DTYPE_BYTES)}"
        )
    if not _are_counts(shape) or len(shape) > 8:
        raise _invalid(f"tensor {name!r}: shape must be a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(f"tensor {name!r}: data_offsets must be [start, end]")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BYTES[dtype] != num_bytes:
        raise _invalid(f"tensor {name!r}: {num_bytes} bytes do not hold {dtype} of shape {shape}")
    return TensorSpec(name, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _are_counts(value: object) -> bool:
    """Lists of ints, which exclude bools and numbers past any file."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MAX_DIM * _MAX_DIM for item in value
    )


def _check_cover(specs: tuple[TensorSpec, ...], data_start: int, file_bytes: int) -> None:
    """The tensors lie back to back from the header's end to the file's."""
    expected = data_start
    for spec in specs:
        if spec.offset < expected:
            raise _invalid(f"tensor {spec.name!r} overlaps another")
        if spec.offset > expected:
            raise _invalid(f"tensor {spec.name!r} leaves a gap before it")
        expected += spec.num_bytes
    if expected > file_bytes:
        raise _invalid("the file is truncated")
    if expected < file_bytes:
        raise _invalid(f"{file_bytes - expected} bytes follow the last tensor")


def _invalid(reason: str) -> AdapterInvalidError:
    return AdapterInvalidError(f"{WEIGHTS_NAME}: {reason}")
