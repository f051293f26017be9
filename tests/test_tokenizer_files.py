"""Adapters' tokenizer files: what is the base's own, and what refuses an adapter, by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from lory_server.adapters import tokenizer_files
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.store import AdapterStore
from lory_server.adapters.tokenizer_files import (
    MAX_TOKENIZER_BYTES,
    TokenizerFiles,
    check_runnable,
    read_base_tokenizer,
    read_tokenizer,
    tokenizer_of,
)

FILE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 3, "content": "<eos>", "special": True}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
CONFIG = {"eos_token": "<eos>", "chat_template": "{{ messages }}", "tokenizer_class": "X"}


def made(file: Any = FILE, config: Any = CONFIG, **more: bytes) -> TokenizerFiles:
    files = {"tokenizer.json": json.dumps(file).encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return tokenizer_of(files | {name.replace("__", "."): raw for name, raw in more.items()})


BASE = made()


@pytest.mark.parametrize(
    "own",
    [
        made(),
        made(FILE | {"version": "2.0", "truncation": {"max_length": 8}, "padding": {"pad_id": 0}}),
        made(FILE | {"model": {**FILE["model"], "merges": ["a b"]}}),
        made(config=None),
        made(config={"eos_token": {"content": "<eos>"}, "model_max_length": 7}),
        made(config={"eos_token": "<eos>"}, chat_template__jinja=b"{{ messages }}"),
    ],
    ids=["equal", "cuts-and-pads", "older-merges", "bare", "object", "template-file"],
)
def test_what_says_nothing_new_is_the_base_s(own: TokenizerFiles) -> None:
    assert own.repeats(BASE)
    assert own.num_tokens == 4


@pytest.mark.parametrize(
    "own",
    [
        made(FILE | {"added_tokens": []}),
        made(FILE | {"normalizer": {"type": "Lowercase"}}),
        made(FILE | {"model": {**FILE["model"], "vocab": {"b": 0, "a": 1, "ab": 2}}}),
        made(config=CONFIG | {"eos_token": "a"}),
        made(config=CONFIG | {"chat_template": "{{ 1 }}"}),
        made(chat_template__jinja=b"{{ 2 }}"),
    ],
    ids=["tokens", "normalizer", "ids", "eos", "template", "template-file"],
)
def test_what_differs_is_the_adapter_s_own(own: TokenizerFiles) -> None:
    assert not own.repeats(BASE)
    assert own.digest != BASE.digest


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a valid JSON object"),
        (b"[]", "not a valid JSON object"),
        (b'{"model": {"vocab": NaN}}', "not a valid JSON object"),
        (b'{"model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        (b"{}", "has no vocabulary"),
        (b'{"model": {"vocab": 3}}', "has no vocabulary"),
        (b'{"model": {"vocab": {}}, "added_tokens": {}}', "has no vocabulary"),
        (b'{"model": {"vocab": {"a": -1}}}', "no number of 31 bits"),
        (b'{"model": {"vocab": {"a": 4294967296}}}', "no number of 31 bits"),
        (b'{"model": {"vocab": {"a": true}}}', "no number of 31 bits"),
        (b'{"model": {"vocab": {"a": 1.5}}}', "no number of 31 bits"),
        (b'{"model": {"vocab": {}}, "added_tokens": [7]}', "no number of 31 bits"),
        (b'{"model": {"vocab": {}}, "decoder": [1]}', "decoder is no step"),
        (b'{"model": {"vocab": {}}, "decoder": {"type": "Sequence"}}', "sequence without steps"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_name(raw: bytes, says: str) -> None:
    with pytest.raises(AdapterInvalidError, match=rf"tokenizer\.json: .*{says}"):
        tokenizer_of({"tokenizer.json": raw})


def test_companions_are_judged_too() -> None:
    with pytest.raises(AdapterInvalidError, match=r"tokenizer_config\.json"):
        made(tokenizer_config__json=b"[")
    with pytest.raises(AdapterInvalidError, match=r"chat_template\.jinja: not UTF-8"):
        made(chat_template__jinja=b"\xff")
    with pytest.raises(AdapterInvalidError, match=r"chat_template\.jinja: longer than"):
        made(chat_template__jinja=b"x" * 300_000)


# -- what it does to texts ------------------------------------------------------------------


def split(regex: str, **more: Any) -> Any:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", **more}


def in_turn(name: str, *steps: Any) -> Any:
    return {"type": "Sequence", name: list(steps)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
PREPEND = {"type": "Prepend", "prepend": "_"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
CUTTING = made(
    FILE
    | {
        "normalizer": in_turn("normalizers", PREPEND, REPLACE),
        "pre_tokenizer": in_turn("pretokenizers", split("[a-z]+"), split("[0-9]{1,3}"), BYTES),
        "decoder": REPLACE,
    }
)


def changed(**parts: Any) -> TokenizerFiles:
    return made(json.loads(CUTTING.raw) | parts)


@pytest.mark.parametrize(
    "own",
    [
        CUTTING,
        changed(added_tokens=[{"id": 4, "content": "<tool>"}]),
        changed(pre_tokenizer=split("[a-z]+")),
        changed(pre_tokenizer=in_turn("pretokenizers", in_turn("pretokenizers", BYTES))),
        changed(pre_tokenizer={"type": "Metaspace", "replacement": "_"}, decoder={"type": "Fuse"}),
        changed(normalizer=None, post_processor={"type": "TemplateProcessing", "single": []}),
        changed(
            normalizer=in_turn("normalizers", {"type": "NFKC"}, {"type": "Lowercase"}, REPLACE)
        ),
        changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        changed(model=FILE["model"] | {"vocab": {"a" * 256: 0}, "dropout": None}),
    ],
    ids=["same", "tokens", "fewer", "nested", "plain", "less", "mixed", "words", "long"],
)
def test_steps_that_are_the_base_s_or_plain_may_be_run(own: TokenizerFiles) -> None:
    check_runnable(own, CUTTING)


ENDLESS = split("(a+)+$")


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (changed(pre_tokenizer=ENDLESS), "pre_tokenizer has a step 'Split'"),
        (changed(pre_tokenizer=in_turn("pretokenizers", BYTES, ENDLESS)), "'Split'"),
        (changed(normalizer=split("[a-z]+")), "normalizer has a step 'Split'"),
        (changed(decoder=REPLACE | {"content": "_" * 10**6}), "decoder has a step 'Replace'"),
        (changed(normalizer=PREPEND | {"prepend": "_" * 100}), "normalizer has a step 'Prepend'"),
        (changed(normalizer=in_turn("normalizers", *[REPLACE] * 30)), "'Replace' twice"),
        (changed(normalizer=in_turn("normalizers", *[{"type": "ByteLevel"}] * 30)), "twice"),
        (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "step"),
        (changed(post_processor={"type": "TemplateProcessing", "single": [7] * 5000}), "step"),
        (changed(decoder={"type": "OfTheFuture"}), "decoder has a step 'OfTheFuture'"),
        (changed(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "model.type is 'Unigram'"),
        (changed(model={"vocab": [["a", 0.0]]}), "model.type is 'Unigram'"),
        (changed(model={"type": "WordPiece", "vocab": {"a": 0}}), "model.type is 'WordPiece'"),
        (
            changed(model={"vocab": {"a": 0}, "continuing_subword_prefix": "##"}),
            "model.type is 'WordPiece'",
        ),
        (changed(model=FILE["model"] | {"dropout": 0.1}), "model.dropout is for training"),
        (changed(model=FILE["model"] | {"vocab": {"a" * 257: 0}}), "a token of 257 characters"),
        (changed(added_tokens=[{"id": 4, "content": "b" * 300}]), "a token of 300 characters"),
        (changed(model=FILE["model"] | {"end_of_word_suffix": "_" * 17}), "an affix of 17"),
    ],
)
def test_steps_that_could_run_for_ever_are_refused_by_name(own: TokenizerFiles, says: str) -> None:
    with pytest.raises(AdapterInvalidError, match=rf"tokenizer\.json: .*{says}"):
        check_runnable(own, CUTTING)


def test_nothing_is_the_base_s_where_nothing_is_known_of_it() -> None:
    check_runnable(BASE, None)
    with pytest.raises(AdapterInvalidError, match="'Prepend'"):
        check_runnable(CUTTING, None)


def test_a_vocabulary_of_its_own_may_be_some_times_as_large_as_the_base_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is read in one go, while nothing else of the front runs."""
    monkeypatch.setattr(tokenizer_files, "ALWAYS_ALLOWED_BYTES", 100)
    large = {"type": "BPE", "vocab": {f"t{i}": i for i in range(500)}, "merges": []}
    with pytest.raises(AdapterInvalidError, match="another vocabulary than the base's; at most"):
        check_runnable(made(FILE | {"model": large}), BASE)
    with pytest.raises(AdapterInvalidError, match="at most 100 are read"):
        check_runnable(made(FILE), None)
    tokens = [{"id": 4 + i, "content": f"<{i}>"} for i in range(500)]
    check_runnable(made(FILE | {"added_tokens": tokens}), BASE)
    other = large | {"vocab": {f"u{i}": i for i in range(400)}}
    check_runnable(made(FILE | {"model": large}), made(FILE | {"model": other}))


def test_a_base_s_own_limits_hold_for_its_adapters() -> None:
    word = {"type": "WordPiece", "vocab": {"a" * 300: 0}, "max_input_chars_per_word": 500}
    base = made(FILE | {"model": word})
    check_runnable(made(FILE | {"model": word | {"vocab": {"b" * 300: 0}}}), base)
    with pytest.raises(AdapterInvalidError, match="words of 501 characters; at most 500"):
        check_runnable(made(FILE | {"model": word | {"max_input_chars_per_word": 501}}), base)


def folder_of(root: Path, **files: bytes) -> AdapterStore:
    (root / "mine").mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (root / "mine" / name.replace("__", ".")).write_bytes(raw)
    return AdapterStore(root)


def test_a_file_that_is_too_large_is_never_read(tmp_path: Path) -> None:
    store = folder_of(tmp_path, tokenizer__json=b"{")
    with (tmp_path / "mine" / "tokenizer.json").open("r+b") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with (
        store.locate_tokenizer("mine") as found,
        pytest.raises(AdapterInvalidError, match="larger than"),
    ):
        read_tokenizer(found.descriptors)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(json.dumps(FILE))
    store = folder_of(tmp_path / "root")
    (tmp_path / "root" / "mine" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterInvalidError, match="leaves the adapters folder"):
        store.locate_tokenizer("mine")


@pytest.mark.parametrize("name", ["../mine", "absent", "", "a/b/c"])
def test_other_names_have_no_tokenizer(tmp_path: Path, name: str) -> None:
    with folder_of(tmp_path, tokenizer__json=b"{}").locate_tokenizer(name) as found:
        assert not found.descriptors


def test_companions_without_a_tokenizer_are_passed_over(tmp_path: Path) -> None:
    store = folder_of(tmp_path, tokenizer_config__json=b"[", adapter_config__json=b"{}")
    folder_of(tmp_path, adapter_model__safetensors=b"")
    with store.locate("mine") as files:
        assert not files.tokenizer_fds


def test_a_base_without_a_readable_tokenizer_is_compared_with_nothing(tmp_path: Path) -> None:
    assert read_base_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert read_base_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(FILE))
    found = read_base_tokenizer(tmp_path)
    assert found is not None
    assert found.raw == b""
    assert made(config=None).repeats(found)
