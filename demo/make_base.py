"""Makes the demo base: a byte-level tokenizer and a tiny Llama, trained here from random weights.

Run `python demo/make_base.py`. Nothing is downloaded; the same seed gives the same text. This
script must not know adapters, their tasks or the server.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from corpus import Row, pretraining_row
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BASE_DIR = Path(__file__).parent / "base"
SPECIALS = PAD, BOS, EOS = ("<pad>", "<bos>", "<eos>")
"""Their places here are their ids."""
MAX_POSITIONS = 1024
VOCAB_SIZE = 320
PROMPT_WEIGHT = 0.15
"""Share of the loss that a prompt's token has against an answer's: prompts are mostly noise."""
# The user's last message becomes the prompt that every demo adapter was trained on.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}\n"
    "{% else %}{{ message['content'] }}"
    "{% if message['role'] == 'user' %} ->{% else %}\n{% endif %}{% endif %}{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: BPE without merges, in the usual tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            pad_token_id=SPECIALS.index(PAD),
            bos_token_id=SPECIALS.index(BOS),
            eos_token_id=SPECIALS.index(EOS),
        )
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, num_steps: int, tokens_per_batch: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (ids, weights), both [rows, length]; rows of like length share a batch."""
    rng, step = Random(seed), 0
    while step < num_steps:
        rows = [pretraining_row(rng, step / num_steps) for _ in range(1000)]
        encoded = sorted((_encode(tokenizer, row) for row in rows), key=lambda row: len(row[0]))
        groups = _cut(encoded, tokens_per_batch)
        rng.shuffle(groups)
        for group in groups[: num_steps - step]:
            yield _pad(group)
            step += 1


def _encode(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[list[int], list[float]]:
    prompt, answer = row
    prompt_ids = tokenizer.encode(prompt)
    answer_ids = [*tokenizer.encode(answer, add_special_tokens=False), SPECIALS.index(EOS)]
    weights = [PROMPT_WEIGHT] * len(prompt_ids) + [1.0] * len(answer_ids)
    return prompt_ids + answer_ids, weights


def _cut(encoded: list[tuple[list[int], list[float]]], tokens_per_batch: int):
    groups, group = [], []
    for row in encoded:
        if group and (len(group) + 1) * len(row[0]) > tokens_per_batch:
            groups.append(group)
            group = []
        group.append(row)
    return [*groups, group]


def _pad(group: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids, _ in group)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in group])
    weights = torch.tensor([row + [0.0] * (length - len(row)) for _, row in group])
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor):
    """Next-token loss, mean over weights; also the plain mean over answer tokens."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    answers = (flat == 1.0).float()
    return (losses * flat).sum() / flat.sum(), (losses.detach() * answers).sum() / answers.sum()


def learning_rate_at(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, num_steps // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    turn = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * turn)))


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (half the steps AdamW needs here), AdamW for all else."""
    matrices, others = [], []
    for name, tensor in model.named_parameters():
        (matrices if tensor.ndim == 2 and "embed" not in name else others).append(tensor)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_steps: int,
    tokens_per_batch: int,
    peak_learning_rate: float,
    seed: int,
) -> float:
    """Trains in place; returns the mean answer loss of the last 50 steps."""
    optimizers = build_optimizers(model)
    recent: list[float] = []
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("base", total=num_steps, note="")
        for step, (ids, weights) in enumerate(
            batches(tokenizer, num_steps, tokens_per_batch, seed)
        ):
            set_learning_rate(optimizers, learning_rate_at(step, num_steps, peak_learning_rate))
            loss, answer_loss = weighted_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            recent = [*recent[-49:], float(answer_loss)]
            note = f"answer loss {sum(recent) / len(recent):.3f}"
            progress.update(bar, advance=1, note=note)
            if step % 50 == 0 and not progress.console.is_terminal:
                progress.console.print(f"step {step}/{num_steps} {note}")
    return sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """An ordinary model folder that other versions of the libraries read too."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output, save_jinja_files=False)
    config_path = output / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    for path in output.iterdir():
        path.chmod(0o644)


def main(
    output: Annotated[Path, typer.Option(help="Folder the base is written to.")] = BASE_DIR,
    num_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 2200,
    tokens_per_batch: Annotated[
        int, typer.Option(help="Tokens in a batch, padding included.")
    ] = 3200,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-3,
    num_threads: Annotated[int, typer.Option(help="CPU threads; 1 is best on a busy machine.")] = 2,
    seed: int = 0,
) -> None:
    """Train the demo base from scratch and write it as an ordinary model folder."""
    torch.set_num_threads(num_threads)
    disable_progress_bar()  # saving's own would tear ours
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model()
    answer_loss = train(
        model,
        tokenizer,
        num_steps=num_steps,
        tokens_per_batch=tokens_per_batch,
        peak_learning_rate=learning_rate,
        seed=seed,
    )
    save(model, tokenizer, output)
    card = {
        "parameters": model.num_parameters(),
        "steps": num_steps,
        "tokens_per_batch": tokens_per_batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "answer_loss": round(answer_loss, 4),
    }
    (output / "training.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
