"""`make gpu-check`: what only a machine with a CUDA device can show, in sections of minutes each.

    python -m benchmarks.gpu_check parity      every GPU path against the CPU reference
    python -m benchmarks.gpu_check step        a decode step and a prompt on an 8B-shaped NF4 base
    python -m benchmarks.gpu_check kernels     every kernel alone: right, then against its limit
    python -m benchmarks.gpu_check curve       1 to 1,000 adapters on that base, served
    python -m benchmarks.gpu_check peft        that base served, beside transformers + PEFT
    python -m benchmarks.gpu_check train       QLoRA on it: the trainer beside PEFT alone and TRL

Needs no network. Findings go to benchmarks/results/gpu.json, a section beside the others, piece by
piece; each section begins nothing more when its time is over, and names what it did not reach.
Without a device nothing is run and nothing claimed; `--device cpu --tiny` runs the script itself on
small shapes, and writes only where `--out` says. It must not know how anything is checked or
measured.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_curve, gpu_kernels, gpu_parity, gpu_step, record
from benchmarks.deadline import Deadline

Keep = Callable[[dict[str, Any]], None]
"""Puts what there is so far into the file, in case the rest never comes."""
Section = Callable[[torch.device, argparse.Namespace, Keep], dict[str, Any]]
RESULT = record.RESULTS / "gpu.json"
PRICE_PER_HOUR = 4.0
GIB = 1 << 30


def parity(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Every check; `passed` only if all did."""
    checks: list[dict[str, Any]] = []
    scope = gpu_parity.Scope(device, arguments.tiny)

    def found() -> dict[str, Any]:
        passed = all(check["passed"] for check in checks)
        return {"passed": passed, "num_checks": len(checks), "checks": _finite(checks)}

    for check in gpu_parity.every_check(scope, Deadline.within(gpu_parity.BUDGET_S)):
        checks.append(asdict(check) | {"passed": check.passed})
        mark = "ok  " if check.passed else "FAIL"
        limits = f"error {check.error:.2e}, at most {check.tolerance:.0e}"
        note = f"; {check.note}" if check.note else ""
        print(f"{mark} {check.name}: {limits}, wrong answer {check.wrong_error:.2e}{note}")
        sys.stdout.flush()
        keep(found())
    num_failed = sum(not check["passed"] for check in checks)
    print(f"{len(checks) - num_failed} of {len(checks)} checks passed")
    return found()


def step(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Passes if no step waits for the device while it is submitted."""
    scale = gpu_step.TINY if arguments.tiny else gpu_step.FULL
    deadline = Deadline.within(scale.budget_s)
    found = gpu_step.measure(
        scale, device, lambda so_far: keep({"passed": False, **so_far}), _print, deadline
    )
    if found["waits"]:
        print(f"FAIL a step waits for the device: {found['waits']}")
    return {"passed": bool(found["points"]) and not found["waits"], **found}


def kernels(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    scale = gpu_kernels.TINY if arguments.tiny else gpu_kernels.FULL
    return gpu_kernels.measure(scale, device, arguments.peers, keep)


def curve(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Passes if anything was measured, and no two names shared their memory."""
    scale = gpu_curve.TINY if arguments.tiny else gpu_curve.FULL
    wishes = gpu_curve.Wishes(
        arguments.price_per_hour, round(arguments.host_gib * GIB), arguments.cuda_graphs
    )
    deadline = Deadline.within(scale.budget_s)
    return gpu_curve.measure(
        scale, device, wishes, deadline, lambda so_far: keep({"passed": False, **so_far}), _print
    )


def peft(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Passes if both answered; how fast they did is told."""
    from benchmarks import gpu_peft

    scale = gpu_peft.TINY if arguments.tiny else gpu_peft.FULL
    deadline = Deadline.within(scale.budget_s)
    return gpu_peft.measure(scale, device, arguments.cuda_graphs, deadline, keep, _print)


def train(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Passes if all learn the same; what they take is told."""
    from benchmarks import gpu_train

    scale = gpu_train.TINY if arguments.tiny else gpu_train.FULL
    return gpu_train.measure(scale, device, Deadline.within(scale.budget_s), keep, _print)


SECTIONS: dict[str, Section] = {
    "parity": parity,
    "step": step,
    "kernels": kernels,
    "curve": curve,
    "peft": peft,
    "train": train,
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("section", choices=sorted(SECTIONS))
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--tiny", action="store_true", help="small shapes: a dry run")
    add("--peers", type=Path, help="kernels: folder of others' unpacked wheels")
    add("--out", type=Path, default=None, help="JSON file")
    add("--price-per-hour", type=float, default=PRICE_PER_HOUR, help="curve: of one device")
    add("--host-gib", type=float, default=0.0, help="curve: for adapters; 0: what is free")
    add("--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="curve, peft")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for dry runs: add --tiny")
    if arguments.peers is not None and arguments.section != "kernels":
        parser.error("--peers is for the section kernels")
    if not arguments.cuda_graphs and arguments.section not in ("curve", "peft"):
        parser.error("--no-cuda-graphs is for the sections curve and peft")
    if arguments.host_gib and arguments.section != "curve":
        parser.error("--host-gib is for the section curve")
    if arguments.price_per_hour != PRICE_PER_HOUR and arguments.section != "curve":
        parser.error("--price-per-hour is for the section curve")
    return arguments


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 unless something failed."""
    arguments = _parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible: nothing was checked, nothing is claimed")
        return 0
    began_s = time.monotonic()
    head = record.facts("benchmarks.gpu_check", argv) | _device_facts(arguments.device)
    is_claim = arguments.device == "cuda" and not arguments.tiny
    path = arguments.out or (RESULT if is_claim else None)

    def keep(found: dict[str, Any], *, is_whole: bool = False) -> None:
        seconds = round(time.monotonic() - began_s, 1)
        if path is not None:
            facts = head | {"seconds": seconds, "is_whole": is_whole}
            merge(path, arguments.section, facts | found)

    if path is not None:
        # As it is: that a file cannot be written is noticed before anything is measured.
        record.write(path, record.read(path) if path.exists() else {})
    found = SECTIONS[arguments.section](torch.device(arguments.device), arguments, keep)
    keep(found, is_whole=True)
    for missed in found.get("not_reached", ()):
        print(f"not measured: {missed}")
    if path is not None:
        print(path)
    return 0 if found["passed"] else 1


def merge(path: Path, section: str, found: dict[str, Any]) -> None:
    """Put one section's findings beside the others'."""
    known = record.read(path) if path.exists() else {}
    record.write(path, known | {section: found})


def _print(line: str) -> None:
    print(line, flush=True)


def _device_facts(device: str) -> dict[str, Any]:
    if device != "cuda":
        return {"device": "cpu, dry run"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "device_memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _finite(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON knows neither infinity nor NaN: null stands for both."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in check.items()
        }
        for check in checks
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
