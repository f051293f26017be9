"""`lory train --dry-run`: what a run would do, need and cost, without the base's weights.

It must not know the terminal's size or colours' codes; rich does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lory_trainer.base import (
    attach,
    choose_device,
    find_base,
    load_tokenizer,
    shape_of_base,
    stop_ids,
)
from lory_trainer.config import TrainOptions
from lory_trainer.data import Example, Item, Pair, longest
from lory_trainer.data_load import LoadedData, load_data
from lory_trainer.loop import Step, plan_steps
from lory_trainer.memory import GIB, MemoryParts, available_bytes, estimate
from lory_trainer.remarks import Remark, remarks
from lory_trainer.settle import settle

NUM_SHOWN = 3
EFFICIENCY = 0.4
"""Of a machine's plain matrix products, that training reaches; a guess, and told as one."""
PROBE_SIZE = 512


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run that has not begun."""

    options: TrainOptions
    data: LoadedData
    steps: Sequence[Step]
    memory: MemoryParts
    available: int
    num_trainable: int
    num_parameters: int
    num_tokens: int
    num_learned: int
    seconds: float


def forecast(options: TrainOptions, folder: Path) -> Forecast:
    base = find_base(options.base, folder)
    data = load_data(options, folder, load_tokenizer(base), stop_ids(base))
    shape = options.model_copy(
        update={"lora": options.lora.model_copy(update={"start_from": None})}
    )
    model = attach(shape_of_base(base, options), shape, folder)
    settled = settle(options, model, data.items, loaded=False)
    steps, _ = plan_steps(data.items, settled)
    num_trainable, num_parameters = model.get_nb_trainable_parameters()
    sequences = 2 if settled.method == "dpo" else 1
    items = [item for step in steps for batch in step for item in batch]
    num_tokens = sum(len(item.ids) for item in items)
    rows = settled.batch_size if isinstance(settled.batch_size, int) else 1
    rows = min(rows, len(data.items)) * sequences
    device = choose_device(settled)
    return Forecast(
        options=settled,
        data=data,
        steps=steps,
        memory=estimate(model, settled, rows=rows, length=max(map(longest, data.items))),
        available=available_bytes(device),
        num_trainable=num_trainable,
        num_parameters=num_parameters,
        num_tokens=num_tokens,
        num_learned=sum(item.num_answer_tokens for item in items),
        seconds=_seconds(num_tokens, num_parameters, settled, device),
    )


def _seconds(num_tokens: int, num_parameters: int, options: TrainOptions, device: str) -> float:
    """Forward 2 operations a parameter and token, backward 2 (weights that are not trained need
    no gradient), once more forward where activations are computed twice; DPO's reference once."""
    wished = options.gradient_checkpointing
    is_spared = device == "cuda" if wished == "auto" else wished
    is_referred = options.method == "dpo" and options.dpo.reference != "none"
    passes = 4 + (2 if is_spared else 0) + (2 / options.epochs if is_referred else 0)
    return passes * num_parameters * num_tokens / (EFFICIENCY * matmul_speed(device))


def matmul_speed(device: str) -> float:
    """Operations a second of this machine, now."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtype)
    torch.mm(a, a)
    count, started_s = 0, perf_counter()
    while (elapsed_s := perf_counter() - started_s) < 0.1:
        (a @ a)[0, 0].item()
        count += 1
    return 2 * PROBE_SIZE**3 * count / elapsed_s


# -- as text -----------------------------------------------------------------------------------


BEGIN, END = ">>>", "<<<"
"""Around what is learned, where there are no colours."""


def show(
    found: Forecast, console: Console, price_per_hour: float, notes: Sequence[str] = ()
) -> None:
    text = yaml.safe_dump(resolved(found.options), sort_keys=False, allow_unicode=True)
    console.print(Panel(Text(text.rstrip()), title="resolved configuration", title_align="left"))
    tokenizer = found.data.encoder.tokenizer
    has_colour = console.color_system is not None and not console.no_color
    how = "grey is read, green is learned" if has_colour else f"{BEGIN} is learned {END}"
    marks = ("", "") if has_colour else (BEGIN, END)
    for number, item in enumerate(found.data.examples[:NUM_SHOWN], start=1):
        drawn = Group(*_rendered(item, tokenizer, marks))
        console.print(Panel(drawn, title=f"example {number}: {how}", title_align="left"))
    console.print(_facts_table(found, price_per_hour))
    console.print(_memory_table(found))
    said: list[Remark] = [(note, "info") for note in notes]
    for text, level in (*said, *remarks(found.options, found.data)):
        style = "yellow" if level == "warning" else ""
        line = f"warning: {text}" if level == "warning" else text
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def resolved(options: TrainOptions) -> dict[str, Any]:
    """A configuration of the same run; what does not concern it is left out."""
    values = options.model_dump(mode="json", exclude_none=True)
    values["lora"]["alpha"] = options.lora.resolved_alpha
    is_of_pairs = options.method == "dpo"
    concerns = {
        "dpo": is_of_pairs,
        "chosen": is_of_pairs,
        "rejected": is_of_pairs,
        "quantization": options.quantization.bits is not None,
        "tracking": bool(options.tracking.to),
        "warmup_fraction": options.warmup_steps is None,
    }
    return {name: value for name, value in values.items() if concerns.get(name, True)}


Marks = tuple[str, str]


def _rendered(
    item: Item, tokenizer: PreTrainedTokenizerBase, marks: Marks = ("", "")
) -> Iterator[Text]:
    if isinstance(item, Pair):
        yield _masked(item.chosen, tokenizer, marks)
        yield Text("instead of", style="bold")
        yield _masked(item.rejected, tokenizer, marks)
    elif isinstance(item, Example):
        yield _masked(item, tokenizer, marks)


def _masked(example: Example, tokenizer: PreTrainedTokenizerBase, marks: Marks = ("", "")) -> Text:
    """Special tokens are shown: where the answer ends matters most."""
    text, place, (begin, stop) = Text(), 0, marks
    for start, end in example.learned:
        text.append(_decoded(example.ids[place:start], tokenizer), style="bright_black")
        learned = _decoded(example.ids[start:end], tokenizer)
        text.append(f"{begin}{learned}{stop}", style="green")
        place = end
    return text


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""


def _facts_table(found: Forecast, price_per_hour: float) -> Table:
    options, data = found.options, found.data
    lengths = sorted(longest(item) for item in data.examples)
    share = 100 * found.num_trainable / found.num_parameters
    table = Table("", "", show_header=False, title="the run", title_justify="left")
    table.add_row(
        "rows",
        f"{data.num_rows:,} to train on, {len(data.validation):,} to evaluate on, "
        f"{len(data.test):,} for lory eval; {data.num_dropped:,} dropped, "
        f"{data.num_cut:,} prompts cut",
    )
    table.add_row(
        "tokens of a row",
        f"median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,} of {options.max_length:,}",
    )
    table.add_row(
        "steps",
        f"{len(found.steps):,}, each of {options.batch_size} x "
        f"{options.gradient_accumulation_steps} rows",
    )
    table.add_row("tokens", f"{found.num_tokens:,} read, {found.num_learned:,} learned")
    table.add_row(
        "trainable",
        f"{found.num_trainable:,} parameters, {share:.2f} % of {found.num_parameters:,}",
    )
    table.add_row("time (a guess)", _duration(found.seconds))
    if price_per_hour:
        cost = found.seconds / 3600 * price_per_hour
        table.add_row("cost (a guess)", f"{cost:.2f} at {price_per_hour:g} an hour")
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory_table(found: Forecast) -> Table:
    parts: Any = found.memory
    table = Table("part", title="memory (an estimate)", title_justify="left")
    table.add_column("GiB", justify="right")
    for name in ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "total"):
        table.add_row(name, f"{getattr(parts, name) / GIB:.3f}")
    fits = parts.total <= found.available
    verdict = "fits" if fits else "does not fit: see the five remedies in docs/training.md"
    table.add_row("free on this machine", f"{found.available / GIB:.3f}")
    table.add_row(verdict, "", style="green" if fits else "red")
    return table
