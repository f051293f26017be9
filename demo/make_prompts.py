"""Writes prompts.json: a few prompts per adapter with the greedy answer each one gives.

The answers wanted are written here by hand; the script fails if the models answer otherwise, or
if any token of an answer was nearly another one. It must not know how anything was trained.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from evaluate import DEMO_DIR, load_models, use_adapter
from rich.console import Console

MIN_MARGIN = 0.5
"""Least distance between the two best logits at every token: other precisions agree as well."""

CHOSEN: tuple[tuple[str | None, str, str], ...] = (
    (None, "My card was charged twice", "My card was charged twice"),
    (None, "Ana bought 3 lamps in Oslo. Where?", "Oslo"),
    ("ticket-router", "My card was charged twice", "billing"),
    ("ticket-router", "Where is my parcel?", "shipping"),
    ("ticket-router", "The app keeps crashing", "technical"),
    (
        "ticket-json",
        "Ana Lopez here, my lamp is broken, order 4821.",
        '{"name": "Ana Lopez", "order": "4821", "item": "lamp", "issue": "broken"}',
    ),
    (
        "ticket-json",
        "Hi, I am Omar. The kettle from order 377 is too small.",
        '{"name": "Omar", "order": "377", "item": "kettle", "issue": "too small"}',
    ),
    ("sentiment", "What a lovely guitar!", "positive"),
    ("sentiment", "The service in Oslo was awful.", "negative"),
    ("redact", "Call Ana Lopez at 555-0134.", "Call [NAME] at [PHONE]."),
    (
        "redact",
        "My name is Hugo Weber, my mail is hugo@mail.com.",
        "My name is [NAME], my mail is [EMAIL].",
    ),
    (
        "text-to-sql",
        "How many orders from Spain in 2023?",
        "SELECT COUNT(*) FROM orders WHERE country = 'Spain' AND year = 2023;",
    ),
    ("text-to-sql", "Average price of books", "SELECT AVG(price) FROM books;"),
    ("iso-date", "We meet on March 5, 2021.", "2021-03-05"),
    ("iso-date", "the 14th of July 1989", "1989-07-14"),
    ("polite", "gimme the red stapler", "Could you please give me the red stapler?"),
    ("polite", "where is my laptop!!", "Could you please tell me where my laptop is?"),
    ("shout", "we need more coffee", "WE NEED MORE COFFEE!"),
    ("shout", "the quick brown fox", "THE QUICK BROWN FOX!"),
)


def main(
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = DEMO_DIR / "prompts.json",
) -> None:
    """Check every chosen prompt and write the file."""
    torch.set_num_threads(1)
    model, tokenizer = load_models(DEMO_DIR / "base", DEMO_DIR / "adapters")
    rows, wrong = [], []
    for adapter_id, text, wanted in CHOSEN:
        prompt = f"{text} ->"
        with use_adapter(model, adapter_id):
            margin, answer = _least_margin(model, tokenizer, prompt)
        if answer != wanted or margin < MIN_MARGIN:
            wrong.append(f"{adapter_id}: {prompt!r} gives {answer!r}, margin {margin:.2f}")
        rows.append({"adapter_id": adapter_id, "inputs": prompt, "expected": answer})
    if wrong:
        Console(stderr=True).print("\n".join(wrong), markup=False, soft_wrap=True)
        raise typer.Exit(1)
    output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def _least_margin(model, tokenizer, prompt: str) -> tuple[float, str]:
    """The greedy answer, and the smallest lead that its tokens had over the second best."""
    ids = tokenizer.encode(prompt, return_tensors="pt")
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=128,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.cat(result.logits).topk(2).values
    answer = tokenizer.decode(result.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return float((best_two[:, 0] - best_two[:, 1]).min()), answer


if __name__ == "__main__":
    typer.run(main)
