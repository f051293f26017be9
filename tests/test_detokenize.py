"""Incremental detokenisation: pieces are the decoding of the whole, never half characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizers
from lory_router.detokenize import Detokenizer
from lory_router.stops import StopFinder
from lory_router.text import TextModel

CORPUS = (
    "the cat sat on the mat. ",
    "h\u00e9llo w\u00f6rld \u4f60\u597d \U0001f600\U0001f680 na\u00efve ",
    "a\n\n b\t c",
)
BYTE_LEVEL = tiny_tokenizers.byte_level()
BYTE_PAIRS = tiny_tokenizers.byte_pairs(CORPUS * 20)
WORDS = tiny_tokenizers.words()
SENTENCE_PIECES = tiny_tokenizers.sentence_pieces()
METASPACE = tiny_tokenizers.metaspace()
FUSED_BYTES = tiny_tokenizers.fused_bytes()

LIMITED = settings(max_examples=150, deadline=None, derandomize=True)


def joined(text: TextModel, token_ids: list[int], prompt_ids: list[int] | None = None) -> str:
    detokenizer = Detokenizer(text, prompt_ids or ())
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    return "".join(pieces) + detokenizer.flush()


def some_ids(text: TextModel, least: int = 0) -> st.SearchStrategy[list[int]]:
    size = text.tokenizer.get_vocab_size()
    return st.lists(st.integers(least, size - 1), max_size=40)


@LIMITED
@given(some_ids(BYTE_LEVEL))
def test_any_bytes_are_decoded_as_the_tokenizer_decodes_the_whole(token_ids: list[int]):
    assert joined(BYTE_LEVEL, token_ids) == BYTE_LEVEL.decode(token_ids)


@LIMITED
@given(some_ids(BYTE_PAIRS))
def test_any_byte_pairs_are_decoded_as_the_tokenizer_decodes_the_whole(token_ids: list[int]):
    assert joined(BYTE_PAIRS, token_ids) == BYTE_PAIRS.decode(token_ids)


@LIMITED
@given(some_ids(WORDS))
def test_words_are_decoded_as_the_tokenizer_decodes_the_whole(token_ids: list[int]):
    assert joined(WORDS, token_ids) == WORDS.decode(token_ids)


@LIMITED
@given(some_ids(METASPACE))
def test_metaspace_is_decoded_as_the_tokenizer_decodes_the_whole(token_ids: list[int]):
    assert joined(METASPACE, token_ids) == METASPACE.decode(token_ids)


@LIMITED
@given(some_ids(SENTENCE_PIECES, least=259))
def test_sentence_pieces_are_decoded_as_the_tokenizer_decodes_the_whole(token_ids: list[int]):
    assert joined(SENTENCE_PIECES, token_ids) == SENTENCE_PIECES.decode(token_ids)


@LIMITED
@given(st.text(max_size=30))
def test_byte_fallback_gives_any_text_back(text: str):
    token_ids = list(SENTENCE_PIECES.encode(text))
    assert joined(SENTENCE_PIECES, token_ids) == SENTENCE_PIECES.decode(token_ids)


@LIMITED
@given(st.text(min_size=1, max_size=30))
@pytest.mark.parametrize("model", [BYTE_LEVEL, BYTE_PAIRS, SENTENCE_PIECES, FUSED_BYTES])
def test_no_piece_of_valid_text_holds_half_a_character(model: TextModel, text: str):
    if "\ufffd" in text:
        return
    detokenizer = Detokenizer(model)
    for token_id in model.encode(text):
        assert "\ufffd" not in detokenizer.push(token_id)


def test_malformed_bytes_are_not_held_for_ever_in_a_window():
    detokenizer = Detokenizer(FUSED_BYTES)
    assert any(detokenizer.push(0xE4) for _ in range(8))


def test_a_malformed_byte_spoils_only_its_own_character():
    """The tokenizer's own decoding of a byte run is all or nothing: it would lose the smile."""
    byte = {value: i for i in range(3, 259) for value in SENTENCE_PIECES.bytes_of(i)}
    smile = [byte[b] for b in "\U0001f600".encode()]
    assert joined(SENTENCE_PIECES, [*smile, byte[0xE4], *smile]) == "\U0001f600\ufffd\U0001f600"


def test_an_unfinished_character_is_held_and_told_at_the_end():
    detokenizer = Detokenizer(BYTE_LEVEL)
    first, second, third = "\u4f60".encode()
    assert [detokenizer.push(first), detokenizer.push(second)] == ["", ""]
    assert detokenizer.flush() == "\ufffd"
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(b) for b in (first, second, third)] == ["", "", "\u4f60"]


@pytest.mark.parametrize("model", [WORDS, SENTENCE_PIECES, METASPACE])
def test_the_first_token_keeps_its_space_behind_a_prompt(model: TextModel):
    word = "t5" if model is WORDS else "cat"
    prompt_ids, token_ids = list(model.encode("t4 the a")), list(model.encode(word))
    assert joined(model, token_ids, prompt_ids) == " " + word
    assert joined(model, token_ids) == word


def test_special_tokens_have_no_text_and_ids_beyond_the_vocabulary_neither():
    eos = BYTE_LEVEL.tokenizer.token_to_id(tiny_tokenizers.EOS)
    assert joined(BYTE_LEVEL, [104, eos, 105, 100_000]) == "hi"


def test_pieces_cost_the_same_however_long_the_text():
    """Decoding calls see a window, never the whole."""
    longest = 0

    class Watched(TextModel):
        def decode(self, token_ids, skip_special_tokens=True):
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    joined(Watched(SENTENCE_PIECES.tokenizer), [263, 264, 3 + 0xE4] * 200)
    joined(Watched(WORDS.tokenizer), [0, 5, 6] * 200)
    assert 0 < longest <= 16


# -- stop strings ---------------------------------------------------------------------------


@LIMITED
@given(
    st.text(alphabet="ab", max_size=24),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_a_stop_string_is_found_across_pieces_as_soon_as_it_is_complete(text, stops, size):
    finder = StopFinder(stops)
    for start in range(0, len(text), size):
        seen = text[: start + size]
        found = finder.push(text[start : start + size])
        starts = [i for stop in stops if (i := seen.find(stop)) >= 0]
        assert found == (min(starts) if starts else None)
        if starts:
            return
        held = seen[finder.safe_length :]
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(
            stop.startswith(seen[i:]) for stop in stops for i in range(finder.safe_length)
        )


def test_without_stop_strings_nothing_is_held():
    finder = StopFinder(())
    assert finder.push("abc") is None
    assert finder.safe_length == 3
