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
    return load_library(user_cache())


def user_cache() -> Path | None:
    """None: this user has no home (an id that the system does not know, and no HOME)."""
    try:
        return Path.home() / ".cache" / "lory" / "kernels"
    except RuntimeError:
        return None


def load_library(cache_dir: Path | None) -> ctypes.CDLL:
    """Loads the kernels from `cache_dir`; compiles them first where they are not there yet.

    Processes may race: each compiles in a folder of its own and renames. A cache that cannot be
    used (absent, closed, full, without executable files) costs a compilation per process, not the
    kernels.
    """
    compiler, runtime = find_compiler(), openmp_runtime()
    if cache_dir is None:
        _log.warning("no home folder for a kernel cache: compiling for this process alone")
        return _compiled_now(compiler, runtime, None)
    library = cache_dir / f"lory_cpu-{_digest(compiler, runtime)}.so"
    return _kept(library) or _compiled_now(compiler, runtime, library)


def _kept(library: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(library)) if library.exists() else None
    except OSError as error:
        _log.warning("%s cannot be loaded (%s): compiling again", library, error)
        return None


def _compiled_now(compiler: str, runtime: Path, library: Path | None) -> ctypes.CDLL:
    """Kept as `library` if that can be, and loaded from there or from where it was compiled."""
    try:
        workshop = tempfile.TemporaryDirectory()
    except OSError as error:
        raise KernelUnavailableError(f"no temporary folder (set TMPDIR): {error}") from error
    with workshop as private_dir:
        compiled = _compile(compiler, runtime, Path(private_dir))
        return (library and _keep(compiled, library)) or _open(compiled)


def _keep(compiled: Path, library: Path) -> ctypes.CDLL | None:
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as beside:
            os.replace(shutil.copy(compiled, beside), library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        _log.warning(
            "kernel cache %s cannot be used (%s): compiled for this process alone",
            library.parent, error,
        )  # fmt: skip
        return None


def find_compiler() -> str:
    """Path of gcc, or of cc."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise KernelUnavailableError("no C compiler found: install gcc")
    return compiler


def openmp_runtime() -> Path:
    """The OpenMP library that torch has loaded into this process."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError as error:
        raise KernelUnavailableError(
            "the CPU kernels need Linux (/proc/self/maps cannot be read)"
        ) from error
    mapped = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    runtimes = sorted(path for path in mapped if path.name.startswith(("libgomp", "libiomp5")))
    beside_torch = [path for path in runtimes if path.is_relative_to(Path(torch.__file__).parent)]
    if not runtimes:
        raise KernelUnavailableError(
            "torch has loaded no OpenMP runtime (libgomp): install the torch that PyPI has"
        )
    return (beside_torch or runtimes)[0]


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelUnavailableError(
            f"{library} cannot be loaded ({error}): set TMPDIR to where executable files may lie"
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
            f"{' '.join(command)} failed (a GCC older than 10 would); the compiler's message"
            f" follows:\n{error.stderr[-2000:]}"
        ) from error
    except OSError as error:
        raise KernelUnavailableError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailableError(
            f"{' '.join(command)} took more than {_COMPILE_TIMEOUT_S} s"
        ) from error
