"""What there is to say of a run before its first step: of options beside the rows and the server.

It must not know who hears it.
"""

from collections.abc import Iterator

from lory_trainer.base import choose_device
from lory_trainer.config import TrainOptions
from lory_trainer.data_load import LoadedData
from lory_trainer.events import Level
from lory_trainer.optimizer import unpaged

Remark = tuple[str, Level]


def remarks(options: TrainOptions, data: LoadedData) -> Iterator[Remark]:
    yield from _on_options(options, data)
    yield from _on_rows(data)


def _on_options(options: TrainOptions, data: LoadedData) -> Iterator[Remark]:
    if options.optimizer.startswith("paged") and choose_device(options) == "cpu":
        yield f"a CPU pages nothing: {unpaged(options.optimizer)} it is", "info"
    held = options.quantization
    if held.bits == 8 or (held.bits == 4 and held.type != "nf4"):
        code = "8 bits" if held.bits == 8 else held.type
        yield (
            f"the base is trained on in {code}, and the server holds it whole or in nf4: what is "
            "served will not be just what was trained",
            "warning",
        )
    if opening := data.encoder.opening().strip():
        yield (
            f"the base's chat template begins every answer with {opening!r}, and so will what is "
            "served",
            "info",
        )
    if _expects_held_out(options) and not data.validation:
        yield "split leaves no row to evaluate on: give more rows, or eval_data", "warning"


def _on_rows(data: LoadedData) -> Iterator[Remark]:
    for finding in data.findings:
        yield str(finding), finding.level
    if data.num_dropped:
        yield f"{data.num_dropped} rows are too long and left out", "warning"
    if data.num_held_out_dropped:
        yield f"{data.num_held_out_dropped} held-out rows are too long and left out", "info"
    if data.num_cut:
        yield (
            f"{data.num_cut} prompts are too long and lose their beginning: raise max_length, or "
            "what is served will not be what was trained",
            "warning",
        )


def _expects_held_out(options: TrainOptions) -> bool:
    split = options.split
    is_shared = split is not None and split.type != "fixed" and split.probabilities[1] > 0
    return is_shared or bool(options.early_stop)
