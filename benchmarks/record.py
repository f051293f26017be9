"""What every result says of itself: when, by which command, on what, with which versions.

It must not know what is measured.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lory_router.bench.machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WHAT_IS_MEASURED = ("--", ".", ":!benchmarks/results")
"""The paths that count when a checkout is called changed: a result changes nothing else."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "numpy")


def facts(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The head of a result that `python -m module arguments` makes."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "commit": _commit(),
        "versions": _versions(),
        "machine": machine_facts(),
    }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all, whenever it is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout, with a mark if files differ from it; None outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", *WHAT_IS_MEASURED)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()
