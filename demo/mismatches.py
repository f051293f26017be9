"""What each way to serve an adapter other than it was trained costs, measured through the server.

Copies of one demo adapter, each changed as some server or caller changes it, are evaluated side by
side on the held-out rows: `mismatches.json`. This script must not know how adapters are served.
"""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import load_file, save_file

from lory_trainer.evaluation.options import EvaluationOptions
from lory_trainer.evaluation.own_server import serving
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.run import evaluate
from lory_trainer.evaluation.server import Server

DEMO_DIR = Path(__file__).parent
TASK = "ticket-json"
METRICS = ("exact_match", "json_valid", "json_schema", "json_fields")
SCHEMA = {
    "type": "object",
    "required": ["name", "order", "item", "issue"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "order": {"type": "string", "pattern": "^[0-9]+$"},
        "item": {"type": "string", "minLength": 1},
        "issue": {"type": "string", "minLength": 1},
    },
    "additionalProperties": False,
}
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Mismatch:
    name: str
    what: str
    change: Callable[[Path], None]
    """Of an adapter's folder."""


def as_template(template: str) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "adapter_manifest.json", template=template)


def scaled(factor: float) -> Callable[[Path], None]:
    """As if the server took another scale for the same tensors."""

    def change(folder: Path) -> None:
        config = folder / "adapter_config.json"
        alpha = json.loads(config.read_text())["lora_alpha"]
        _edit(config, lora_alpha=alpha * factor)

    return change


def without_mlp(folder: Path) -> None:
    config = folder / "adapter_config.json"
    kept = [name for name in json.loads(config.read_text())["target_modules"] if name not in MLP]
    _edit(config, target_modules=kept)
    weights = folder / "adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(weights).items() if not any(m in n for m in MLP)}
    save_file(tensors, weights)


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _rank() -> int:
    return json.loads((DEMO_DIR / "adapters" / TASK / "adapter_config.json").read_text())["r"]


def mismatches() -> tuple[Mismatch, ...]:
    return (
        Mismatch("right", "served as trained", lambda folder: None),
        Mismatch("chat", "another template: `User: ...` and `Assistant:`", _chat),
        Mismatch("raw", "no template", as_template("{text}")),
        Mismatch("newline", "one more newline after the prompt", as_template("{text} ->\n")),
        Mismatch("space", "one more space after the prompt", as_template("{text} -> ")),
        Mismatch("no-mlp", "LoRA on MLP modules dropped", without_mlp),
        Mismatch("rslora", "rsLoRA's scale ignored: 1/sqrt(r) of it", scaled(_rank() ** -0.5)),
        Mismatch("twice", "scale applied twice", scaled(_scale())),
    )


_chat = as_template("User: {text}\nAssistant:")


def _scale() -> float:
    config = json.loads((DEMO_DIR / "adapters" / TASK / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def write_adapters(folder: Path) -> None:
    for mismatch in mismatches():
        shutil.copytree(DEMO_DIR / "adapters" / TASK, folder / mismatch.name)
        mismatch.change(folder / mismatch.name)


def measure(url: str, schema: Path, num_rows: int) -> Evaluation:
    """All of them on the same rows, through the server at `url`."""
    schema.write_text(json.dumps(SCHEMA))
    options = EvaluationOptions(
        data=str(DEMO_DIR / "data" / TASK / "eval.jsonl"),
        adapters=tuple(mismatch.name for mismatch in mismatches()),
        metrics=tuple(m if m != "json_schema" else f"json_schema={schema}" for m in METRICS),
        compare=(),
        rows=num_rows,
        concurrency=16,
    )

    async def ask() -> Evaluation:
        async with Server(url, "", options.concurrency) as server:
            return await evaluate(options, server, None, lambda *_: None)

    return asyncio.run(ask())


def main(
    output: Annotated[Path, typer.Option(help="JSON file of the scores.")] = (
        DEMO_DIR / "mismatches.json"
    ),
    num_rows: Annotated[int, typer.Option(help="Held-out rows, from the first.")] = 100,
) -> None:
    """Measure every mismatch on the demo's base."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder) / "adapters"
        write_adapters(adapters)
        with serving(str(DEMO_DIR / "base"), str(adapters), ("--dtype", "float32")) as url:
            result = measure(url, Path(folder) / "schema.json", num_rows)
    told = {
        mismatch.name: {"what": mismatch.what, "rows": len(result.rows)}
        | {name: round(score.value, 4) for name, score in variant.scores.items()}
        for mismatch, variant in zip(mismatches(), result.variants, strict=True)
    }
    output.write_text(json.dumps({"task": TASK, "served": told}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
