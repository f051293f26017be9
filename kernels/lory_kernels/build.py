"""Compiles csrc/lory_cpu.c for this machine on first use and loads it.

In: the C sources and the compiler found. Out: a ctypes library that shares the OpenMP runtime torch
has loaded. It must not know what the functions in the library do.

The runtime matters: an object linked to the system's libgomp beside torch's own has a second pool
of spinning threads, and the two fight over the cores (ten times slower).
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from lory_kernels.contract import KernelUnavailableError

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
)
_COMPILE_TIMEOUT_S = 120

_log = logging.getLogger(__name__)


@functools.cache
def compiled_library() -> ctypes.CDLL:
    """The kernels for this CPU, from the user's cache if they were compiled before."""
    return load_library(Path.home() / ".cache" / "lory" / "kernels")


def load_library(cache_dir: Path) -> ctypes.CDLL:
    """Loads the kernels from `cache_dir`; compiles them first where they are not there yet.

    Processes may race: each compiles under a name of its own and renames. A cache that cannot be
    written costs a compilation per process, not the kernels.
    """
    compiler, runtime = find_compiler(), openmp_runtime()
    library = cache_dir / f"lory_cpu-{_digest(compiler, runtime)}.so"
    if library.exists():
        return _open(library)
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        workshop = tempfile.TemporaryDirectory(dir=cache_dir)
    except OSError as error:
        _log.warning("kernel cache %s cannot be written (%s): compiling for once", cache_dir, error)
        with tempfile.TemporaryDirectory() as private_dir:
            return _open(_compile(compiler, runtime, Path(private_dir)))
    with workshop:
        os.replace(_compile(compiler, runtime, Path(workshop.name)), library)
    return _open(library)


def find_compiler() -> str:
    """Path of gcc, or of cc."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise KernelUnavailableError(
            "no C compiler found: install gcc, or choose the kernel backend 'torch'"
        )
    return compiler


def openmp_runtime() -> Path:
    """The OpenMP library that torch has loaded into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise KernelUnavailableError(
            "the CPU kernels need Linux (/proc/self/maps): choose the kernel backend 'torch'"
        ) from error
    mapped = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    runtimes = sorted(path for path in mapped if path.name.startswith(("libgomp", "libiomp5")))
    beside_torch = [path for path in runtimes if path.is_relative_to(Path(torch.__file__).parent)]
    if not runtimes:
        raise KernelUnavailableError(
            "torch has loaded no OpenMP runtime (libgomp): choose the kernel backend 'torch'"
        )
    return (beside_torch or runtimes)[0]


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelUnavailableError(
            f"{library} cannot be loaded ({error}): delete it, and allow executable files there"
        ) from error


def _digest(compiler: str, runtime: Path) -> str:
    """Changes with the sources, the flags, the compiler, the CPU and the OpenMP runtime."""
    stat = Path(compiler).resolve().stat()
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    features = [line for line in cpu if line.startswith(("model name", "flags", "Features", "CPU"))]
    parts = [*_FLAGS, compiler, f"{stat.st_size} {stat.st_mtime_ns}", str(runtime), *features]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(_SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: str, runtime: Path, directory: Path) -> Path:
    """Compiles, then links without -fopenmp, so that the runtime named is the only one."""
    compiled, library = directory / "lory_cpu.o", directory / "lory_cpu.so"
    _call([compiler, *_FLAGS, "-c", str(_SOURCES / "lory_cpu.c"), "-o", str(compiled)])
    rpath = f"-Wl,-rpath,{runtime.parent}"
    _call([compiler, "-shared", str(compiled), str(runtime), rpath, "-lm", "-o", str(library)])
    return library


def _call(command: list[str]) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        raise KernelUnavailableError(
            f"{' '.join(command)} failed (GCC 10 or newer is needed):\n{error.stderr[-2000:]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailableError(
            f"{' '.join(command)} took more than {_COMPILE_TIMEOUT_S} s"
        ) from error
