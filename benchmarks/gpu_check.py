"""`make gpu-check`: what only a machine with a CUDA device can show, in sections of minutes each.

    python -m benchmarks.gpu_check parity      every GPU path against the CPU reference
    python -m benchmarks.gpu_check step        time of a decode step of an 8B-shaped NF4 base
    python -m benchmarks.gpu_check kernels     every kernel alone: right, then against its limit
    python -m benchmarks.gpu_check train       QLoRA on it: the trainer beside PEFT alone and TRL

Needs no network. Findings go to benchmarks/results/gpu.json, a section beside the others. Without
a device nothing is run and nothing claimed; `--device cpu --tiny` runs the script itself on small
shapes, and writes only where `--out` says. It must not know how anything is checked or measured.
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

from benchmarks import gpu_kernels, gpu_parity, gpu_step, record

Keep = Callable[[dict[str, Any]], None]
"""Puts what there is so far into the file, in case the rest never comes."""
Section = Callable[[torch.device, argparse.Namespace, Keep], dict[str, Any]]
RESULT = record.RESULTS / "gpu.json"


def parity(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Every check; `passed` only if all did."""
    checks: list[dict[str, Any]] = []

    def found() -> dict[str, Any]:
        passed = all(check["passed"] for check in checks)
        return {"passed": passed, "num_checks": len(checks), "checks": _finite(checks)}

    for check in gpu_parity.every_check(gpu_parity.Scope(device, arguments.tiny)):
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

    def say(found: dict[str, Any]) -> None:
        point = found["points"][-1]
        print(
            f"batch {point['batch']:3d}, {point['distinct_adapters']:3d} adapters: "
            f"step {point['step_ms']:8.2f} ms, forward {point['forward_ms']:8.2f} ms, "
            f"limit {point['limit_ms']:6.2f} ms",
            flush=True,
        )
        keep({"passed": False, **found})

    found = gpu_step.measure(scale, device, say)
    if found["waits"]:
        print(f"FAIL a step waits for the device: {found['waits']}")
    return {"passed": not found["waits"], **found}


def kernels(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    scale = gpu_kernels.TINY if arguments.tiny else gpu_kernels.FULL
    return gpu_kernels.measure(scale, device, arguments.peers)


def train(device: torch.device, arguments: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Passes if all learn the same; what they take is told."""
    from benchmarks import gpu_train

    found = gpu_train.measure(gpu_train.TINY if arguments.tiny else gpu_train.FULL, device)
    for name, one in found["contenders"].items():
        gib = one["peak_bytes"] / 2**30
        print(f"{name:5s} {one['tokens_per_s']:10,.1f} tokens/s, {gib:6.2f} GiB at most")
    return found


SECTIONS: dict[str, Section] = {
    "parity": parity,
    "step": step,
    "kernels": kernels,
    "train": train,
}


def main(argv: Sequence[str]) -> int:
    """The exit code: 0 unless something failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__)
    parser.add_argument("section", choices=sorted(SECTIONS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a dry run")
    parser.add_argument("--peers", type=Path, help="kernels: folder of others' unpacked wheels")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for dry runs: add --tiny")
    if arguments.peers is not None and arguments.section != "kernels":
        parser.error("--peers is for the section kernels")
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

    found = SECTIONS[arguments.section](torch.device(arguments.device), arguments, keep)
    keep(found, is_whole=True)
    if path is not None:
        print(path)
    return 0 if found["passed"] else 1


def merge(path: Path, section: str, found: dict[str, Any]) -> None:
    """Put one section's findings beside the others'."""
    known = record.read(path) if path.exists() else {}
    record.write(path, known | {section: found})


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
