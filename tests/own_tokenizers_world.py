"""A tiny base of 32 tokens and adapters that bring tokenizers and vocabularies of their own, made
by transformers and PEFT; and what those two make of them."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny_models
from lory_server.adapters.manner import with_tokenizer
from lory_server.adapters.tokenizer_files import COMPANIONS, TOKENIZER_NAME, tokenizer_of
from lory_server.messages import NO_MANNER, EngineOptions, Manner
from parity_world import Reference, small_options
from trainer_world import CHAT_TEMPLATE, char_tokenizer, make_base

BASE_TOKENS = 32
ADDED = ("<tool>", "<note>", "<stop>")
"""Tokens 31 to 33; the last is special, and ends an answer."""
OWN_TOKENS = 34
TEMPLATE = "{% for m in messages %}<note>{{ m['content'] }}{% endfor %}<tool>"


@dataclass(frozen=True)
class Made:
    folder: Path
    num_tokens: int
    """Of its embedding; 0: the base's."""
    brings: bool


@dataclass(frozen=True)
class World:
    base: Path
    adapters_dir: Path
    adapters: dict[str, Made]

    def manner(self, name: str) -> Manner:
        made = self.adapters.get(name)
        if made is None or not made.brings:
            return NO_MANNER
        paths = [made.folder / file for file in (TOKENIZER_NAME, *COMPANIONS)]
        files = tokenizer_of({path.name: path.read_bytes() for path in paths if path.is_file()})
        return with_tokenizer(NO_MANNER, files.digest, made.num_tokens)

    def num_tokens(self, name: str) -> int:
        made = self.adapters.get(name)
        return made.num_tokens or BASE_TOKENS if made else BASE_TOKENS

    def folders(self) -> dict[str, Path]:
        return {name: made.folder for name, made in self.adapters.items()}

    def options(self, **changes: Any) -> EngineOptions:
        fields = {"full_weight_bytes": 1 << 20} | changes
        return small_options(self.base, self.adapters_dir, **fields)


class OwnReference(Reference):
    """transformers + PEFT over a base that was resized as the adapter's was."""

    def __init__(self, world: World) -> None:
        super().__init__(world.base)
        self._sizes = {made.folder: made.num_tokens for made in world.adapters.values()}

    def _adapted(self, adapter: Path | None) -> Any:
        from peft import PeftModel

        model = resized(self._base, 0 if adapter is None else self._sizes[adapter])
        if adapter is None:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(adapter)).eval()

    def answer(
        self, prompt: list[int], adapter: Path | None, num: int, ends: set[int]
    ) -> list[int]:
        """Greedy, the token that ends it included."""
        ids = list(prompt)
        for _ in range(num):
            ids.append(int(self.logits(ids, adapter)[-1].argmax()))
            if ids[-1] in ends:
                break
        return ids[len(prompt) :]


def make_world(folder: Path, *, is_tied: bool = False) -> World:
    base = make_base(folder / "base", tie_word_embeddings=is_tied)
    adapters = folder / "adapters"
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]}
    tokenizer = grown()
    made = {
        "plain": _adapter(adapters / "plain", base, 1, None, 0),
        "same": _adapter(adapters / "same", base, 2, char_tokenizer(chat=CHAT_TEMPLATE), 0),
        "grown": _adapter(adapters / "grown", base, 3, tokenizer, OWN_TOKENS, **whole),
        "saved": _adapter(adapters / "saved", base, 4, tokenizer, OWN_TOKENS),
        "team/wide": _adapter(adapters / "team/wide", base, 5, tokenizer, 80, **whole),
        "shrunk": _adapter(adapters / "shrunk", base, 6, swapped(), 31, **whole),
        "swapped": _adapter(adapters / "swapped", base, 7, swapped(), 0),
    }
    if is_tied:
        made["tied"] = _adapter(
            adapters / "tied",
            base,
            8,
            tokenizer,
            OWN_TOKENS,
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=True,
        )
    return World(base, adapters, made)


def grown() -> PreTrainedTokenizerFast:
    tokenizer = char_tokenizer(chat=TEMPLATE)
    tokenizer.add_tokens(list(ADDED[:2]))
    tokenizer.add_special_tokens({"eos_token": ADDED[2]})
    return tokenizer


def swapped() -> PreTrainedTokenizerFast:
    """As many tokens as the base's: two letters have each other's ids."""
    from tokenizers import Tokenizer

    text = char_tokenizer().backend_tokenizer.to_str()
    text = text.replace('"a":3', '"a":4').replace('"b":4', '"b":3')
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token="<bos>", eos_token="<eos>"
    )


def resized(base: Path, num_tokens: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if num_tokens:
        torch.manual_seed(0)
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


def _adapter(
    folder: Path,
    base: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None,
    num_tokens: int,
    **fields: Any,
) -> Made:
    model = resized(base, num_tokens)
    tiny_models.save_adapter(folder, model, 4, 8, ["q_proj", "v_proj"], seed, **fields)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    repeats = tokenizer is None or folder.name == "same"
    return Made(folder, num_tokens, not repeats)
