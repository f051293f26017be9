"""Calls of the C ops: what they take, and programs of calls that are made once and run often.

csrc/step.h says what a call and a step are. An op is called with weights, buffers and geometry in a
struct of its own; what changes from step to step comes beside it. It must not know what an op
computes, models or adapters.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

_CACHE_LINE = 64
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p


class Step(ctypes.Structure):
    """`step` of csrc/step.h. Pointers that no op of the calls reads may be null."""

    _fields_ = (
        ("tokens", _LONG),
        ("rows", _LONG),
        ("max_blocks", _LONG),
        ("positions", _POINTER),
        ("kv_slots", _POINTER),
        ("block_tables", _POINTER),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("lora", _POINTER),
    )


class Norm(ctypes.Structure):
    """`norm_args` of csrc/elementwise.h."""

    _fields_ = (
        ("x", _POINTER),
        ("weight", _POINTER),
        ("residual", _POINTER),
        ("out", _POINTER),
        ("width", _LONG),
        ("mode", _INT),
        ("eps", _FLOAT),
    )


class Gated(ctypes.Structure):
    """`gated_args` of csrc/elementwise.h."""

    _fields_ = (("gate_up", _POINTER), ("out", _POINTER), ("width", _LONG))


class Rope(ctypes.Structure):
    """`rope_args` of csrc/elementwise.h."""

    _fields_ = (
        ("qkv", _POINTER),
        ("qkv_stride", _LONG),
        ("cos_sin", _POINTER),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("rotary_dim", _INT),
        ("heads", _INT),
        ("kv_heads", _INT),
        ("head_dim", _INT),
        ("block_size", _INT),
        ("norm_mode", _INT),
        ("norm_eps", _FLOAT),
    )


class Attention(ctypes.Structure):
    """`attention_args` of csrc/attention.h."""

    _fields_ = (
        ("qkv", _POINTER),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("out", _POINTER),
        ("qkv_stride", _LONG),
        ("heads", _INT),
        ("kv_heads", _INT),
        ("head_dim", _INT),
        ("block_size", _INT),
        ("window", _INT),
        ("scale", _FLOAT),
        ("softcap", _FLOAT),
    )


class Sgmv(ctypes.Structure):
    """`sgmv_args` of csrc/sgmv.h."""

    _fields_ = (
        ("site", _POINTER),
        ("y", _POINTER),
        ("x", _POINTER),
        ("y_stride", _LONG),
        ("x_stride", _LONG),
    )


class Linear(ctypes.Structure):
    """`linear_args` of csrc/linear.h."""

    _fields_ = (("weight", _POINTER), ("y", _POINTER), ("x", _POINTER))


class _Scratch(ctypes.Structure):
    """`panel_scratch` of csrc/linear.h."""

    _fields_ = (("memory", _POINTER), ("bytes_per_thread", _LONG))


class Op(ctypes.Structure):
    """`step_call` of csrc/step.h; an op itself is one without arguments."""

    _fields_ = (("op", _POINTER), ("team", _POINTER), ("args", _POINTER))


def op(library: ctypes.CDLL, name: str) -> Op:
    return Op.in_dll(library, name)


def _runner(library: ctypes.CDLL) -> Callable[..., None]:
    run: Any = library.run_calls
    run.argtypes = (_POINTER, _LONG, _POINTER, _INT, _POINTER)
    run.restype = None
    return run


@dataclass(slots=True)
class _Buffer:
    """Handed out again once nobody holds the tensor that was handed out before."""

    data: Tensor
    holder: "ReferenceType[Tensor] | None" = None


@dataclass(slots=True)
class _Recording:
    """Calls noted down instead of made, with all that they point to."""

    max_tokens: int
    calls: list[Op] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    buffers: list[_Buffer] = field(default_factory=list)

    def buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        for known in self.buffers:
            is_free = known.holder is None or known.holder() is None
            if is_free and known.data.shape[1] == width and known.data.dtype == dtype:
                return self._hand_out(known)
        self.buffers.append(_Buffer(torch.zeros((self.max_tokens, width), dtype=dtype)))
        return self._hand_out(self.buffers[-1])

    def _hand_out(self, buffer: _Buffer) -> Tensor:
        tensor = buffer.data.view(buffer.data.shape)
        buffer.holder = ref(tensor)
        return tensor


class Program:
    """Recorded calls, to be run with one step after another, of at most `max_tokens` tokens."""

    def __init__(self, library: ctypes.CDLL, recording: _Recording, threads: int) -> None:
        self.max_tokens = recording.max_tokens
        self._run = _runner(library)
        self._threads = threads
        self._num_calls = len(recording.calls)
        self._calls = (Op * self._num_calls)(*recording.calls)
        self._counters = (_LONG * self._num_calls)()
        self._kept = recording.kept
        self._buffers = recording.buffers

    @property
    def num_bytes(self) -> int:
        return sum(buffer.data.nbytes for buffer in self._buffers)

    def run(self, step: Step) -> None:
        if step.tokens > self.max_tokens:
            raise ValueError(f"a step of {step.tokens} tokens, recorded for {self.max_tokens}")
        self._run(
            ctypes.addressof(self._calls),
            self._num_calls,
            ctypes.addressof(step),
            self._threads,
            ctypes.addressof(self._counters),
        )


class Caller:
    """Makes calls, or records them. `threads` bounds the cores that a call may use."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._run = _runner(library)
        self._threads = threads
        self._recording: _Recording | None = None
        self._scratch = _Scratch()
        self._scratch_memory = torch.empty(0, dtype=torch.uint8)

    def scratch(self, bytes_per_thread: int) -> int:
        """Address of a struct that says where each thread has at least so much memory of its own,
        whose contents do not outlive a call. The struct stays, the memory grows with demand."""
        if bytes_per_thread > self._scratch.bytes_per_thread:
            rounded = -(-bytes_per_thread // _CACHE_LINE) * _CACHE_LINE
            size = rounded * self._threads + _CACHE_LINE
            self._scratch_memory = torch.empty(size, dtype=torch.uint8)
            start = self._scratch_memory.data_ptr()
            self._scratch.memory = -(-start // _CACHE_LINE) * _CACHE_LINE
            self._scratch.bytes_per_thread = rounded
        return ctypes.addressof(self._scratch)

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def call(self, op: Op, args: ctypes.Structure, step: Step, *kept: object) -> None:
        """`kept`: whatever `args` points to that others do not keep."""
        call = Op(op.op, op.team, ctypes.addressof(args))
        if self._recording is not None:
            self._recording.calls.append(call)
            self._recording.kept.append((args, *kept))
            return
        self._run(ctypes.addressof(call), 1, ctypes.addressof(step), self._threads, None)

    def empty(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width], or all rows of a buffer of the program that is recorded."""
        if self._recording is not None:
            return self._recording.buffer(width, dtype)
        return torch.empty((rows, width), dtype=dtype)

    @contextmanager
    def record(self, max_tokens: int) -> Iterator[Callable[[], Program]]:
        """Within it calls are recorded; what it gives makes the program of them."""
        assert self._recording is None, "one recording at a time"
        recording = self._recording = _Recording(max_tokens)
        try:
            yield lambda: Program(self._library, recording, self._threads)
        finally:
            self._recording = None
