"""A random tiny base, a character tokenizer and rows of letters, for the trainer's tests."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lory_trainer.config import parse_options
from lory_trainer.events import Event, read_events
from lory_trainer.train import Places, TrainResult, train_adapter

# Warns, as peft imports bitsandbytes, of kernels that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}>{% endif %}{% endfor %}"
)
CONFIG = """
base: tiny
data: rows.jsonl
template: "{text}>"
lora: {r: 4, dtype: float32}
epochs: 4
batch_size: 4
learning_rate: 2e-2
"""


def char_tokenizer(*, pad_is_eos: bool = False, chat: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character, a BOS before every text."""
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {chr(97 + i): 3 + i for i in range(26)}
    inner = Tokenizer(models.WordLevel(vocab | {" ": 29, ">": 30}, unk_token=">"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    pad = "<eos>" if pad_is_eos else "<pad>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )
    if chat is not None:
        tokenizer.chat_template = chat
    return tokenizer


def make_base(folder: Path, *, hidden_size: int = 32, **changes: Any) -> Path:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        **changes,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    char_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def make_world(folder: Path, **changes: Any) -> Path:
    """A folder with a random base and eight rows."""
    make_base(folder / "tiny", **changes)
    rows = [{"text": a + b, "completion": b} for a in "abcd" for b in "yz"]
    write_rows(folder / "rows.jsonl", *rows)
    return folder


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def train(world: Path, text: str, **changes: Any) -> TrainResult:
    """A run whose adapter is world/adapters/mine, unless `changes` say otherwise."""
    places = {
        "folder": world,
        "output": world / "adapters" / "mine",
        "run": world / "runs" / "mine",
    }
    names = ("folder", "output", "run", "replace", "resume")
    places |= {name: changes.pop(name) for name in names if name in changes}
    return train_adapter(parse_options(text), Places(**places), **changes)


def events(world: Path, kind: str | None = None, run: str = "mine") -> list[Event]:
    return [e for e in read_events(world / "runs" / run) if kind in (None, e["type"])]


def tensor_bytes(world: Path, name: str = "mine") -> bytes:
    return (world / "adapters" / name / "adapter_model.safetensors").read_bytes()
