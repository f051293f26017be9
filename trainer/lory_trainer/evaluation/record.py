"""Writes what an evaluation found into the manifest of the adapter that answered.

The scores travel with the folder then; how it is asked, and so its revision, stays as it is. It
must not know how anything was measured.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.results import Evaluation, GateResult

MANIFEST = "adapter_manifest.json"
KEY = "scores"


def record(adapters: Path, result: Evaluation, gates: Sequence[GateResult]) -> Path:
    """The manifest's path; scores that it held before are replaced."""
    path = adapters / result.candidate / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("expected an object")
        text = json.dumps({**manifest, KEY: scores(result, gates)}, indent=2, sort_keys=True)
        draft = path.with_name(f".{MANIFEST}.draft")
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--record: {path} cannot be written: {error}") from error
    return path


def scores(result: Evaluation, gates: Sequence[GateResult]) -> dict[str, Any]:
    """Every variant's figures with their intervals, on which rows, and what was asked of them."""
    return {
        "data": {"sha256": result.data_sha256, "rows": len(result.rows)},
        "candidate": result.candidate,
        "greedy": result.is_greedy,
        "variants": {
            variant.name: {
                name: {key: round(value, 6) for key, value in asdict(score).items()}
                for name, score in variant.scores.items()
            }
            for variant in result.variants
        },
        "gates": [{"condition": gate.condition, "holds": gate.holds} for gate in gates],
    }
