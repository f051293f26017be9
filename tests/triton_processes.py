"""Triton in processes of its own, and its kernels compiled ahead of time for absent GPUs.

The interpreter is chosen when triton is imported, so a test file runs itself again in a mode:
`findings_of(__file__, "interpret")` in a fixture, `answer({...})` under its `__main__`. This module
must not know any kernel, and imports triton only where it compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import lory_kernels

Findings = dict[str, dict[str, Any]]
"""What a mode found out: subject to case to number."""

SHARED_MEMORY_LIMIT_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""A block's most shared memory by architecture; the keys are the ones to compile for. sm_80 itself
has 163 KB; what is laid out for it also runs on sm_86, sm_89 and sm_120 (A10, L4, RTX), which have
99."""

needs_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is not installed"),
]


@dataclass(frozen=True)
class Built:
    """What one compiled kernel takes."""

    registers: int
    spilled_bytes: int
    """The stack frame of a thread: these kernels have no other use for one."""
    shared_bytes: int
    ptx: str = field(repr=False)


def findings_of(file: str, mode: str) -> Findings:
    """Runs a test file in a process of its own; a mode `interpret...` is with the interpreter."""
    path = os.pathsep.join(str(Path(p).parent) for p in (lory_kernels.__path__[0], file))
    interpreted = {"TRITON_INTERPRET": "1" if mode.startswith("interpret") else "0"}
    done = subprocess.run(
        [sys.executable, file, mode],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def answer(modes: Mapping[str, Callable[[], Findings]]) -> None:
    """The other end of `findings_of`."""
    if sys.argv[1].startswith("interpret"):
        _patch_the_language_once_a_launch()
    json.dump(modes[sys.argv[1]](), sys.stdout)


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches triton.language for a launch, and again whenever one function calls
    another, which takes most of its time. Triton's own functions see another name of it, for which
    once is enough: that patch stays."""
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def build(
    kernel: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Collection[str] = (),
    **options: int,
) -> Built:
    """Compiles a kernel for sm_<arch> by hand: arguments that `types` leaves out are i32.

    Pointers count as aligned; `aligned` names the integers that launches have in multiples of 16.
    `constants` holds the constexprs, and arguments that are 1 or None. `options` are num_warps and
    num_stages. `launches_built` needs none of this where the launching function can be called.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if kinds[name].startswith("*") or name in aligned
    }
    used = {name: constants[name] for name in names if name in constants}
    source = ASTSource(kernel, kinds, used, attributes)
    return _sizes(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def launches_built(call: Callable[[], object], arch: int) -> dict[str, Built]:
    """Compiles for sm_<arch> what `call` launches, with the very arguments; nothing runs.

    Keys are kernel names; a kernel launched twice must be launched alike.
    """
    with _compiled_instead_of_run(arch) as found:
        call()
    return {name: _sizes(compiled) for name, compiled in found.items()}


@contextmanager
def _compiled_instead_of_run(arch: int) -> Iterator[dict[str, Any]]:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid), f"grid {grid}"
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert found.setdefault(self.fn.__name__, compiled) is compiled

    driver.set_active(_NoDriver(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class _NoDriver:
    """As much of a driver as compiling asks for; the device's number is the architecture."""

    arch: int

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0


def _sizes(compiled: Any) -> Built:
    """What cuobjdump says of the machine code itself, and Triton of its shared memory."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None, said
    return Built(int(usage[1]), int(usage[2]), compiled.metadata.shared, compiled.asm["ptx"])
