"""The command: measures what is asked for and prints one table.

    python -m lory_kernels.bench
    python -m lory_kernels.bench --op sgmv --backend triton --shapes 8b --rows 8,64 --ranks 16,mixed
    python -m lory_kernels.bench --op sgmv --popularity distinct,equal-8 --peers FOLDER --json FILE
    TRITON_INTERPRET=1 python -m lory_kernels.bench --backend triton --dtype float16 --shapes tiny

Exits with 1 if an answer of ours was wrong or failed. It must not know any op.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# Triton is optional.

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from lory_kernels import Backend, KernelUnavailableError, best_cpu_backend
from lory_kernels.bench.case import Place
from lory_kernels.bench.clock import Effort
from lory_kernels.bench.popularity import POPULARITIES, Popularity, by_name
from lory_kernels.bench.run import run
from lory_kernels.bench.selection import OPS, Selection, cases_of
from lory_kernels.bench.sgmv import Ranks
from lory_kernels.bench.shapes import MODELS, ModelShape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST_SECONDS = 60.0
PACKAGES = ("torch", "triton", "bitsandbytes")
Value = TypeVar("Value")


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        place = make_place(arguments.backend, DTYPES[arguments.dtype])
    except (KernelUnavailableError, ValueError) as error:
        parser.error(str(error))
    selection = _selection(arguments)
    head = _facts(place) | {"command": shlex.join(["python", "-m", "lory_kernels.bench", *argv])}
    _say(f"{head['device']}, backend {place.backend}, {place.dtype}, {head['threads']} threads")
    _explain(selection)
    found = run(
        place,
        Effort(arguments.seconds),
        arguments.peers,
        lambda peers: cases_of(selection, place, peers.sgmv),
        _say,
    )
    formulas = {one.name: one.formula for one in selection.popularities}
    if arguments.json is not None:
        report = head | {"popularities": formulas} | found
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _say(str(arguments.json))
    return 0 if found["passed"] else 1


def make_place(backend: Backend | None, dtype: torch.dtype) -> Place:
    """Raises KernelUnavailableError or ValueError with what to change."""
    has_cuda = torch.cuda.is_available()
    if backend is None:
        backend = "triton" if has_cuda else best_cpu_backend()
    on_cuda = has_cuda and backend != "cpu" and not (backend == "triton" and _interprets())
    place = Place.at(backend, torch.device("cuda" if on_cuda else "cpu"), dtype)
    place.new_ops()
    if place.is_interpreted and dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: add --dtype float16")
    return place


def _interprets() -> bool:
    """Whether Triton runs in its interpreter; not if it is not there at all."""
    try:
        import triton
    except ModuleNotFoundError:
        return False
    return triton.knobs.runtime.interpret


def _explain(selection: Selection) -> None:
    if "sgmv" in selection.ops:
        for popularity in selection.popularities:
            _say(f"popularity {popularity.name}: {popularity.formula}")


def _facts(place: Place) -> dict[str, Any]:
    on_cuda = place.device.type == "cuda"
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(place.device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    installed = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def _selection(arguments: argparse.Namespace) -> Selection:
    return Selection(
        models=arguments.shapes,
        ops=arguments.op,
        rows=arguments.rows,
        ranks=arguments.ranks,
        popularities=arguments.popularity,
        contexts=arguments.contexts,
        prefill=arguments.prefill,
        every_tiling=arguments.every_tiling,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lory_kernels.bench",
        description="Measures every op against its limit, its reference and its peers. Values "
        "that are lists are separated by commas.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--op", type=_ops, default="all", help=f"of {', '.join(OPS)}, or all")
    add("--backend", choices=["cpu", "triton", "torch"], help="the best one here if not given")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of weights and activations")
    add("--shapes", type=_list(_model), default="small", help=f"of {', '.join(MODELS)}")
    add("--rows", type=_list(_positive), default="1,32", help="tokens of a step")
    add("--ranks", type=_list(Ranks.parse), default="16", help="of adapters: numbers, or mixed")
    known = ", ".join(POPULARITIES)
    add("--popularity", type=_popularities, default="all", help=f"of {known}, equal-N, or all")
    add("--contexts", type=_list(_positive), default="512", help="tokens a decoding row sees")
    add(
        "--prefill",
        type=_one(_count),
        default=256,
        help="tokens of attention's whole prompt; 0: none",
    )
    add("--every-tiling", action="store_true", help="nf4 in Triton: tiles not served, too")
    add("--threads", type=_one(_count), default=0, help="on a CPU; 0: as torch has them")
    add("--seconds", type=_one(_seconds), default=0.1, help="of repetitions, for each figure")
    add("--peers", type=_one(_folder), help="folder with vllm_src and sgl_src: unpacked wheels")
    add("--json", type=_one(_writable), help="write the findings to this file too")
    return parser


def _one(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """A type for argparse, which hides what a ValueError says."""

    def parse_told(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_told


def _list(parse: Callable[[str], Value]) -> Callable[[str], tuple[Value, ...]]:
    return _one(lambda text: tuple(parse(part) for part in text.split(",")))


def _ops(text: str) -> tuple[str, ...]:
    return OPS if text == "all" else _list(_op)(text)


def _popularities(text: str) -> tuple[Popularity, ...]:
    return tuple(POPULARITIES.values()) if text == "all" else _list(by_name)(text)


def _op(text: str) -> str:
    if text not in OPS:
        raise ValueError(f"{text!r} is not one of {', '.join(OPS)}")
    return text


def _model(text: str) -> ModelShape:
    if text not in MODELS:
        raise ValueError(f"{text!r} is not one of {', '.join(MODELS)}")
    return MODELS[text]


def _positive(text: str) -> int:
    if not _count(text):
        raise ValueError(f"{text!r} is not a number above 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number, or it is below 0")
    return int(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= MOST_SECONDS:
        raise ValueError(f"{text!r} is not between 0 and {MOST_SECONDS:g}")
    return seconds


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise ValueError(f"{text} is not a folder")
    return Path(text)


def _writable(text: str) -> Path:
    """Asked before minutes are spent on what could not be written."""
    if Path(text).is_dir() or not Path(text).resolve().parent.is_dir():
        raise ValueError(f"{text} cannot be written: its folder is not there")
    return Path(text)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
