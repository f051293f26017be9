"""A stand-in for CUDA graphs on the CPU: ops are noted down while a callable runs, and run again.

As on a device, none of the callable's Python runs again: whatever it read that is no tensor is
fixed, every op reads and writes the memory it was captured with, and memory that nobody has
written is dirty. Kernels are noted as a whole: what they do inside is their own affair.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lory_kernels import Ops
from sync_trap import SyncTrap

_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like")


@dataclass(frozen=True)
class Call:
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def again(self) -> None:
        result = self.result
        if isinstance(result, torch.Tensor) and _name(self.op) in _EMPTY:
            result.fill_(torch.nan if result.is_floating_point() else -7)
            return
        fresh = self.op(*self.args, **self.kwargs)
        if isinstance(result, torch.Tensor) and fresh.data_ptr() != result.data_ptr():
            result.copy_(fresh)


@dataclass
class Tape:
    """A `Graph`: what one callable did."""

    calls: list[Call] = field(default_factory=list)
    output: Any = None
    num_replays: int = 0

    @torch.inference_mode()
    def replay(self) -> torch.Tensor:
        self.num_replays += 1
        with _no_modes():
            for call in self.calls:
                call.again()
        return self.output


class TapeOps:
    """`Ops` whose kernels are noted down while a recorder records."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.tape: Tape | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with _no_modes():
                result = kernel(*args, **kwargs)
            if self.tape is not None:
                self.tape.calls.append(Call(kernel, args, kwargs, result))
            return result

        return call


class Recorder:
    """A `Capture` for decoders whose ops are `ops`."""

    def __init__(self, ops: TapeOps) -> None:
        self._ops = ops
        self.tapes: list[Tape] = []

    def __call__(self, run: Callable[[], torch.Tensor]) -> Tape:
        run()  # as the real one: kernels are warm before anything is captured
        tape = Tape()
        self._ops.tape = tape
        with SyncTrap(), _Noting(tape):
            tape.output = run()
        self._ops.tape = None
        self.tapes.append(tape)
        return tape

    @property
    def num_replays(self) -> int:
        return sum(tape.num_replays for tape in self.tapes)


@contextmanager
def _no_modes() -> Iterator[None]:
    """What watches Python's calls to torch sees no kernel and no replay."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class _Noting(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._tape.calls.append(Call(func, args, kwargs, result))
        return result


def _name(op: Any) -> str:
    return op.name().partition(".")[0] if isinstance(op, torch._ops.OpOverload) else ""
