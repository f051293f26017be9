"""Scores base and adapters on the held-out rows: greedy exact match, into accuracy.json.

The same rows and the same score drive transformers + PEFT here, or with `--url` a running server,
by `lory eval`'s own code. This script must not know how anything was trained.
"""

import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lory_trainer.evaluation.options import EvaluationOptions
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.rows import read_data
from lory_trainer.evaluation.run import evaluate
from lory_trainer.evaluation.server import Server
from lory_trainer.template import render

if TYPE_CHECKING:
    from peft import PeftModel

DEMO_DIR = Path(__file__).parent
MAX_NEW_TOKENS = 128

Generate = Callable[[Sequence[str], str | None], list[str]]
"""Prompts and an adapter_id (None: the base) to greedy answers, end of sequence left out."""

Scores = dict[str, dict[str, float]]
"""By task: of the base, of the adapter, and of how many rows."""


def eval_file(task: str) -> Path:
    return DEMO_DIR / "data" / task / "eval.jsonl"


def read_eval(task: str) -> list[tuple[str, str]]:
    """(prompt as sent, wanted answer) of every held-out row."""
    manifest = json.loads((DEMO_DIR / "adapters" / task / "adapter_manifest.json").read_text())
    rows = read_data(eval_file(task), "completion").rows
    return [(render(manifest["template"], row.values), row.wanted) for row in rows]


def exact_match(
    generate: Generate, rows: Sequence[tuple[str, str]], adapter_id: str | None
) -> float:
    """Share of rows whose whole answer, up to the end of sequence, is the wanted one."""
    answers = generate([prompt for prompt, _ in rows], adapter_id)
    return sum(got == want for got, (_, want) in zip(answers, rows, strict=True)) / len(rows)


def load_models(base: Path, adapters: Path) -> tuple["PeftModel", PreTrainedTokenizerBase]:
    """The base with every adapter attached, none of them in use yet."""
    # bitsandbytes warns, as peft imports it, of kernels that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import PeftModel

    disable_progress_bar()  # of loading weights, which takes no time
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = sorted(folder.name for folder in adapters.iterdir() if folder.is_dir())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        # peft still reads a name that transformers is about to rename.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = PeftModel.from_pretrained(model, adapters / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters / name, adapter_name=name)
    return model.eval(), tokenizer


@contextmanager
def use_adapter(model: "PeftModel", adapter_id: str | None) -> Iterator[None]:
    if adapter_id is None:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(adapter_id)
        yield


def local_generate(base: Path, adapters: Path) -> Generate:
    """transformers + PEFT on this machine's CPU, prompts of one length at a time: no padding."""
    model, tokenizer = load_models(base, adapters)

    def generate(prompts: Sequence[str], adapter_id: str | None) -> list[str]:
        with use_adapter(model, adapter_id):
            return _greedy(model, tokenizer, prompts)

    return generate


@torch.inference_mode()
def _greedy(model, tokenizer, prompts: Sequence[str]) -> list[str]:
    answers: dict[int, str] = {}
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for length in sorted({len(ids) for ids in encoded}):
        places = [place for place, ids in enumerate(encoded) if len(ids) == length]
        batch = torch.tensor([encoded[place] for place in places])
        output = model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        answers.update(zip(places, texts, strict=True))
    return [answers[place] for place in range(len(prompts))]


def local_scores(tasks: Sequence[str], num_rows: int) -> Scores:
    generate = local_generate(DEMO_DIR / "base", DEMO_DIR / "adapters")
    scores: Scores = {}
    for task in tasks:
        rows = read_eval(task)[:num_rows]
        base, adapter = exact_match(generate, rows, None), exact_match(generate, rows, task)
        scores[task] = {"base": base, "adapter": adapter, "rows": len(rows)}
    return scores


async def evaluate_task(url: str, task: str, num_rows: int) -> Evaluation:
    """The same through a running server, as `lory eval` does it."""
    options = EvaluationOptions(
        data=str(eval_file(task)),
        adapters=(task,),
        rows=num_rows,
        max_new_tokens=MAX_NEW_TOKENS,
        concurrency=16,
    )
    async with Server(url, "", options.concurrency) as server:
        return await evaluate(options, server, None, lambda *_: None)


def served_scores(url: str, tasks: Sequence[str], num_rows: int) -> Scores:
    scores: Scores = {}
    for task in tasks:
        result = asyncio.run(evaluate_task(url, task, num_rows))
        found = {one.name: one.scores["exact_match"].value for one in result.variants}
        scores[task] = {"base": found["base"], "adapter": found[task], "rows": len(result.rows)}
    return scores


def main(
    url: Annotated[str | None, typer.Option(help="Score a running server instead.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the scores.")] = None,
    num_rows: Annotated[int, typer.Option(help="Rows of each task, from the first.")] = 100,
    num_threads: Annotated[int, typer.Option(help="CPU threads of the local run.")] = 2,
) -> None:
    """Exact match of every adapter, and of the base on the same prompts."""
    torch.set_num_threads(num_threads)
    tasks = sorted(folder.name for folder in (DEMO_DIR / "adapters").iterdir() if folder.is_dir())
    scores = served_scores(url, tasks, num_rows) if url else local_scores(tasks, num_rows)
    table = Table("adapter", "base", "with the adapter")
    for task, score in scores.items():
        table.add_row(task, f"{score['base']:.0%}", f"{score['adapter']:.0%}")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
