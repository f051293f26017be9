"""A tokenizer made of the base's model and tokens added is the one that its file stands for."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import tiny_tokenizers
from lory_router import own_texts
from lory_router.own_texts import OwnTexts
from lory_router.shared_tokenizer import share_model
from lory_router.text import TextModel, load_text_model
from lory_server.adapters.tokenizer_files import tokenizer_of
from lory_server.messages import Manner

TEXTS = ("the cat sat on the mat", "of mice and men", "a tale of two cities, and of cats")
ADDED: tuple[AddedToken, ...] = (
    AddedToken("<tool>", special=False, normalized=False),
    AddedToken("<end>", special=True, normalized=False),
    AddedToken("mat", single_word=True, normalized=True),
    AddedToken(" <pad>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("the", special=True, normalized=False),
)
KINDS = {
    "trained": lambda: tiny_tokenizers.byte_pairs(TEXTS),
    "bytes": tiny_tokenizers.byte_level,
    "pieces": tiny_tokenizers.sentence_pieces,
    "words": tiny_tokenizers.words,
}


def grown(base: TextModel, added: tuple[AddedToken, ...] = ADDED) -> Tokenizer:
    tokenizer = Tokenizer.from_str(base.tokenizer.to_str())
    tokenizer.add_tokens(list(added))
    return tokenizer


def rest_of(file: str) -> bytes:
    return tokenizer_of({"tokenizer.json": file.encode()}).rest


def texts() -> list[str]:
    draw = random.Random(7)
    parts = [
        *(one.content for one in ADDED),
        *" ".join(TEXTS).split(),
        " ",
        "  ",
        "\u00e9",
        "<",
        "t5",
    ]
    return ["".join(draw.choices([*parts, " "], k=draw.randint(0, 12))) for _ in range(200)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_cuts_and_joins_as_the_file_would(kind: str) -> None:
    base = KINDS[kind]()
    own = grown(base)
    own.post_processor = TemplateProcessing(
        single="<end> $A", pair="<end> $A $B", special_tokens=[("<end>", own.token_to_id("<end>"))]
    )
    own.enable_truncation(4)
    own.enable_padding()
    shared = share_model(base.tokenizer, rest_of(own.to_str()))
    assert shared is not None
    assert shared.longest_added == max(
        len(token.content) for token in own.get_added_tokens_decoder().values()
    )
    mine, theirs = TextModel(shared.tokenizer), TextModel(Tokenizer.from_str(own.to_str()))
    assert mine.special_ids == theirs.special_ids
    assert mine.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    for text in texts():
        ids = theirs.encode(text)
        assert mine.encode(text) == ids, text
        assert mine.locate(text) == theirs.locate(text)
        for skips in (True, False):
            assert mine.decode(ids, skips) == theirs.decode(ids, skips)


def test_the_base_does_not_notice() -> None:
    base = tiny_tokenizers.byte_pairs(TEXTS)
    before, size = [base.encode(text) for text in texts()], base.tokenizer.get_vocab_size()
    shared = share_model(base.tokenizer, rest_of(grown(base).to_str()))
    assert shared is not None
    shared.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert [base.encode(text) for text in texts()] == before
    assert base.tokenizer.get_vocab_size() == size


def changed(file: str, change: Any) -> bytes:
    value = json.loads(file)
    change(value["added_tokens"])
    return rest_of(json.dumps(value))


def test_tokens_that_would_get_other_ids_are_left_to_the_file() -> None:
    base = tiny_tokenizers.byte_pairs(TEXTS)
    file = grown(base).to_str()

    def move(added: Any) -> None:
        added[-1]["id"] += 7

    assert share_model(base.tokenizer, changed(file, move)) is None
    assert share_model(base.tokenizer, changed(file, lambda added: added.reverse())) is not None


@pytest.mark.parametrize("added", [7, [7], [{"id": 1}], [{"id": "1", "content": "x"}]])
def test_what_are_no_tokens_is_refused(added: Any) -> None:
    base = tiny_tokenizers.byte_level()
    rest = json.dumps({"version": "1.0", "added_tokens": added}).encode()
    with pytest.raises(ValueError, match="added_tokens"):
        share_model(base.tokenizer, rest)


def test_an_adapter_s_tokenizer_is_read_whole_only_if_its_model_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a vocabulary takes its time, and ten times its bytes in memory."""
    trained = tiny_tokenizers.byte_pairs(TEXTS)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text(trained.tokenizer.to_str())
    base = load_text_model(str(tmp_path / "base"))
    manners: dict[str, Manner] = {}
    for name, own in (("one", grown(base)), ("two", tiny_tokenizers.words().tokenizer)):
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(own.to_str())
        digest = tokenizer_of({"tokenizer.json": own.to_str().encode()}).digest
        manners[name] = Manner(digest=name, tokenizer=digest)
    read: list[str] = []

    class Reading:
        @staticmethod
        def from_str(text: str) -> Tokenizer:
            read.append(text)
            return Tokenizer.from_str(text)

    monkeypatch.setattr(own_texts, "Tokenizer", Reading)
    texts = OwnTexts(base, str(tmp_path / "adapters"), 2)
    one = asyncio.run(texts.of("one", manners["one"]))
    assert read == []
    assert one.encode("the <tool>") == TextModel(grown(base)).encode("the <tool>")
    assert one.longest_token >= base.longest_token
    asyncio.run(texts.of("two", manners["two"]))
    assert len(read) == 1
