"""What the trained model says of a few rows, kept in the manifest to compare a server's with.

This module must not know loops, files or options.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from lory_trainer.data import Example, Item, Pack, Pair

NUM_ROWS = 8
MOST_TOKENS = 256


@torch.no_grad()
def probe(model: PeftModel, items: Sequence[Item]) -> dict[str, Any]:
    """Rows: ids, and for each token from `start` on what was predicted there (top, and its logit)
    and the token's own log-probability."""
    was_training = model.training
    model.eval()
    rows = [_row(model, example) for example in _examples(items)]
    model.train(was_training)
    return {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "rows": rows}


def _examples(items: Sequence[Item]) -> list[Example]:
    """The first of each kind of item, short enough to be asked at once."""
    found: list[Example] = []
    for item in items:
        examples = item.examples if isinstance(item, Pack) else (_one(item),)
        found += (e for e in examples if len(e.ids) <= MOST_TOKENS)
        if len(found) >= NUM_ROWS:
            break
    return found[:NUM_ROWS]


def _one(item: Example | Pair) -> Example:
    return item.chosen if isinstance(item, Pair) else item


def _row(model: PeftModel, example: Example) -> dict[str, Any]:
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([example.ids], device=device), use_cache=False).logits[0]
    start = max(1, example.num_prompt_tokens)
    logits = logits[start - 1 : -1].float()
    best = logits.max(dim=-1)
    said = torch.tensor(example.ids[start:], device=device)
    logprobs = logits.log_softmax(dim=-1).gather(1, said[:, None])[:, 0]
    return {
        "ids": list(example.ids),
        "start": start,
        "top": best.indices.tolist(),
        "logits": _rounded(best.values),
        "logprobs": _rounded(logprobs),
    }


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def learns_to_end(probes: dict[str, Any]) -> bool:
    """Of at least one row, the end was predicted where it is."""
    return any(row["top"][-1] == row["ids"][-1] for row in probes["rows"]) or not probes["rows"]
