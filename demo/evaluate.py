"""Scores base and adapters on the held-out rows: greedy exact match, into accuracy.json.

The same rows and the same score drive transformers + PEFT here, or a running server with
`--url`. This script must not know how anything was trained.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from peft import PeftModel

DEMO_DIR = Path(__file__).parent
MAX_NEW_TOKENS = 128

Generate = Callable[[Sequence[str], str | None], list[str]]
"""Prompts and an adapter_id (None: the base) to greedy answers, end of sequence left out."""


def read_eval(task: str) -> list[tuple[str, str]]:
    """(prompt as sent, wanted answer) of every held-out row."""
    manifest = json.loads((DEMO_DIR / "adapters" / task / "adapter_manifest.json").read_text())
    lines = (DEMO_DIR / "data" / task / "eval.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [(manifest["template"].format(**row), row["completion"]) for row in rows]


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


def http_generate(url: str) -> Generate:
    """A running server's POST /generate, 16 requests at a time."""
    client = httpx.Client(base_url=url, timeout=120)

    def one(prompt: str, adapter_id: str | None) -> str:
        parameters: dict[str, object] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        if adapter_id is not None:
            parameters["adapter_id"] = adapter_id
        reply = client.post("/generate", json={"inputs": prompt, "parameters": parameters})
        reply.raise_for_status()
        return reply.json()["generated_text"]

    def generate(prompts: Sequence[str], adapter_id: str | None) -> list[str]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda prompt: one(prompt, adapter_id), prompts))

    return generate


def main(
    url: Annotated[str | None, typer.Option(help="Score a running server instead.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the scores.")] = None,
    num_rows: Annotated[int, typer.Option(help="Rows of each task, from the first.")] = 100,
    num_threads: Annotated[int, typer.Option(help="CPU threads of the local run.")] = 2,
) -> None:
    """Exact match of every adapter, and of the base on the same prompts."""
    torch.set_num_threads(num_threads)
    adapters = DEMO_DIR / "adapters"
    generate = http_generate(url) if url else local_generate(DEMO_DIR / "base", adapters)
    table = Table("adapter", "base", "with the adapter")
    scores: dict[str, dict[str, float]] = {}
    for task in sorted(folder.name for folder in adapters.iterdir() if folder.is_dir()):
        rows = read_eval(task)[:num_rows]
        base, adapter = exact_match(generate, rows, None), exact_match(generate, rows, task)
        scores[task] = {"base": base, "adapter": adapter, "rows": len(rows)}
        table.add_row(task, f"{base:.0%}", f"{adapter:.0%}")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
