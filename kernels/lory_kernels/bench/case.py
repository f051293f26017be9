"""What is measured: one call, its inputs, the work it cannot avoid, and who makes it.

Plain data. It must not know any op, how a call is timed, or what is done with the findings.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from lory_kernels import select
from lory_kernels.contract import Backend, Ops
from lory_kernels.reference import TorchOps

Inputs = TypeVar("Inputs")
Run = Callable[[], tuple[Tensor, ...]]
"""Makes the call; gives what it wrote."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest difference over largest magnitude that an answer may have."""

Role = Literal["ours", "reference", "peer"]
REFERENCE = "torch"


@dataclass(frozen=True, slots=True)
class Contender(Generic[Inputs]):
    """Somebody who makes the call."""

    name: str
    role: Role
    prepare: Callable[[Inputs], Run]
    """What a server does once (packing, tables) is done here; the run is what is timed."""
    can_capture: bool = True
    """Whether a CUDA graph can hold it: nothing in it waits for the device."""
    per_step: Callable[[Inputs], Run] | None = None
    """What must be made anew for each step, before the call, and is timed apart."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was launched, for whoever chooses by the figures; plain values."""


@dataclass(frozen=True, slots=True)
class Label:
    """Names a case in tables."""

    op: str
    shape: str
    rows: int
    ranks: str = ""
    popularity: str = ""
    distinct: int = 0
    """Adapters in the step."""

    def __str__(self) -> str:
        mix = " ".join(part for part in (self.ranks, self.popularity) if part)
        return f"{self.op} {self.shape}, {self.rows} rows" + (f", {mix}" if mix else "")


@dataclass(frozen=True, slots=True)
class Case(Generic[Inputs]):
    label: Label
    dtype: torch.dtype
    make_inputs: Callable[[], Inputs]
    expected: Callable[[Inputs], tuple[Tensor, ...]]
    """The right answer; may overwrite its inputs."""
    spoiled: Callable[[Inputs], Inputs] | None
    """Inputs with a mistake that an answer must show; None: the answer is what was there."""
    contenders: tuple[Contender[Inputs], ...]
    num_bytes: int
    """Read and written once each: what no kernel can avoid."""
    flops: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a table of choices is keyed by; plain values."""

    @property
    def tolerance(self) -> float:
        return 0.0 if self.spoiled is None else TOLERANCE[self.dtype]


@dataclass(frozen=True, slots=True)
class Place:
    """Where contenders run."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator
    new_ops: Callable[[], Ops]
    """Of the backend, anew for each case: they keep the tables that they were called with."""

    @classmethod
    def at(cls, backend: Backend, device: torch.device, dtype: torch.dtype) -> "Place":
        generator = torch.Generator(device).manual_seed(0)
        return cls(backend, device, dtype, generator, partial(select, backend))

    @property
    def is_interpreted(self) -> bool:
        """Triton without a GPU: answers count, times mean nothing."""
        return self.backend == "triton" and self.device.type == "cpu"

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device)
        return drawn.normal_(std=std, generator=self.generator)

    def integers(self, values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=self.device)

    def contenders(
        self, bind: Callable[[Ops, Inputs], Run], *, reference_waits: bool = False
    ) -> Iterator[Contender[Inputs]]:
        """The backend's op and the reference's; `reference_waits`: for values on the device."""
        if self.backend != REFERENCE:
            ops = self.new_ops()
            yield Contender(self.backend, "ours", lambda inputs: bind(ops, inputs))
        reference = TorchOps()
        yield Contender(
            REFERENCE, "reference", lambda inputs: bind(reference, inputs), not reference_waits
        )


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested dataclasses and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in fields(value))
        return replace(value, **{name: mapped(getattr(value, name), change) for name in names})
    if isinstance(value, tuple):
        return tuple(mapped(one, change) for one in value)
    return value


def cloned(inputs: Inputs) -> Inputs:
    return mapped(inputs, Tensor.clone)


def tensor_bytes(inputs: object) -> int:
    """Of all tensors in it, shared ones once for each mention."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    mapped(inputs, count)
    return total
