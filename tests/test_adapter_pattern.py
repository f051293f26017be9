"""Patterns match exactly what `re` matches, and none can make the server wait."""

import gc
import json
import re
import time
from itertools import combinations, islice
from string import ascii_letters
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_server.adapters.config import read_config
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.first_match import FirstMatch
from lory_server.adapters.pattern import Pattern, Work

ATOMS = ("a", "b", "_", ".", r"\.", "[ab]", "[^a]", "[a-c_]", r"\w", r"\d", r"\b", r"\B", "^", "$")
QUANTIFIERS = ("*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "{0}", "*?", "+?", "??", "{1,2}?")


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeated = st.tuples(inner, st.sampled_from(QUANTIFIERS)).map(lambda t: f"(?:{t[0]}){t[1]}")
    either = st.tuples(inner, inner).map(lambda t: f"({t[0]}|{t[1]})")
    return st.one_of(st.tuples(inner, inner).map("".join), repeated, either)


expressions = st.recursive(st.sampled_from(ATOMS), _grow, max_leaves=6)
names = st.text("ab._1c", max_size=8)


@settings(max_examples=400, deadline=None)
@given(expressions, names)
def test_a_pattern_matches_what_re_matches(text: str, name: str) -> None:
    assert Pattern("f", text).matches(name) == bool(re.fullmatch(text, name))


@settings(max_examples=400, deadline=None)
@given(expressions, names)
def test_a_suffix_matches_as_in_pefts_get_pattern_key(text: str, name: str) -> None:
    expected = bool(re.match(rf"(.*\.)?({text})$", name))
    assert Pattern("f", text, suffix=True).matches(name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        ("^model.layers.0.self_attn.q_proj", True),
        ("^self_attn.q_proj", False),
        ("model.layers.1.self_attn.q_proj", False),
        (r"layers\.(0|2)\.self_attn\.[qv]_proj", True),
        ("proj", False),
    ],
)
def test_keys_as_people_write_them(text: str, expected: bool) -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert Pattern("rank_pattern", text, suffix=True).matches(name) is expected


def test_the_regex_that_unsloth_writes() -> None:
    text = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    pattern = Pattern("target_modules", text)
    assert pattern.matches("model.layers.11.self_attn.q_proj")
    assert not pattern.matches("model.layers.11.self_attn.k_proj")


@pytest.mark.parametrize(
    "text",
    [
        r"(a+)+$",
        r"(\w+\w+)+!",
        r"(.*)*(.*)*(.*)*(.*)*(.*)*zz",
        r"((a{1000}){1000}){1000}",
        r"((.*.*)*(.*.*)*)*!",
        r"(\w*\.?)*\w*\d{9}",
        "(a|aa)+b",
        "(.{0,9999}){9999}b",
    ],
)
def test_a_hostile_pattern_is_matched_or_refused_at_once(text: str) -> None:
    pattern = Pattern("target_modules", text, suffix=True)
    started_s = time.monotonic()
    for index in range(20):
        assert not pattern.matches(f"model.layers.{index}.self_attn.{'a' * 60}#")
    assert time.monotonic() - started_s < 2


def test_work_is_bounded_over_all_names() -> None:
    pattern = Pattern("target_modules", "(" + "|".join(f"(.*a{i}.*)*" for i in range(300)) + ")*b")
    names = ["model.layers.0.self_attn.q_proj"] * 10_000
    with pytest.raises(AdapterInvalidError, match=r"target_modules .* takes too long to match"):
        any(pattern.matches(name) for name in names)


MODULES = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(126) for part in "qkvoGUD"]
"""As many as the largest Llama has."""
CLASSES = [f"[{a}{b}]" for a in ascii_letters for b in ascii_letters if a != b]


def refusal(**fields: Any) -> str:
    """Why it is refused, which takes well under a second of a reader's time."""
    raw = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **fields}).encode()
    gc.disable()  # else it looks through what all tests before have left
    try:
        started_s = time.thread_time()
        with pytest.raises(AdapterInvalidError) as refused:
            _choose(raw)
        taken_s = time.thread_time() - started_s
    finally:
        gc.enable()
    assert taken_s < 1.2
    return str(refused.value)


def _choose(raw: bytes) -> list[tuple[int, float]]:
    config = read_config(raw)
    return [config.rank_and_scale(name) for name in MODULES if config.is_selected(name)]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_hostile_patterns_are_refused_at_once(field: str) -> None:
    """Work was counted too cheaply, for one: some of these held a reader for seven seconds."""
    many = {f"zz{i}": 4 for i in range(4097)}
    assert f"{field} has 4097 patterns, at most 4096" in refusal(**{field: many})
    expressions = {f"(.*z{i}.*)*": 4 for i in range(257)}
    assert f"{field} has 257 regular expressions" in refusal(**{field: expressions})
    costly = dict.fromkeys(list(expressions)[:256], 4)
    assert f"{field} '(.*z" in refusal(**{field: costly}, target_modules="all-linear")
    long = {"." * 3990 + f"({i})": 4 for i in range(200)}
    assert "takes too long to match" in refusal(**{field: long})
    classes = {f"({'|'.join(CLASSES[i : i + 500])}){i}": 4 for i in range(200)}
    assert "takes too long to match" in refusal(**{field: classes})


def test_names_with_their_dots_in_thousands_of_places_are_refused_at_once() -> None:
    """Each would be looked up by itself."""
    end = "Zelf_attn.q_proj"
    places = islice(combinations(range(len(end)), 4), 4096)
    names = ["".join("." if i in dots else c for i, c in enumerate(end)) for dots in places]
    assert "rank_pattern takes too long" in refusal(rank_pattern=dict.fromkeys(names, 4))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_hostile_choice_of_modules_is_refused_at_once(field: str) -> None:
    fields: dict[str, Any] = {"target_modules": "all-linear"}
    classes = "|".join(CLASSES[:660])
    assert f"{field} '[ab]|" in refusal(**fields | {field: classes})
    nested = "(" + "|".join(f"(.*a{i}.*)*" for i in range(280)) + ")*b"
    assert "takes too long to match" in refusal(**fields | {field: nested})
    assert "is longer than 4096 characters" in refusal(**fields | {field: "a|" * 3000})


@pytest.mark.parametrize("field", ["layers_pattern", "modules_to_save"])
def test_a_long_name_of_a_module_is_refused_at_once(field: str) -> None:
    """Sixty-four of 14 KB were made into regular expressions, for two seconds."""
    fields: dict[str, Any] = {"layers_to_transform": [1]}
    names = [f"a{i}" + "_b" * 7000 for i in range(64)]
    assert f"{field}: 'a0_b" in refusal(**fields | {field: names})
    many = [f"a{i}" for i in range(65)]
    assert f"{field} must be a list of at most 64" in refusal(**fields | {field: many})


def test_a_rank_for_each_module_of_a_large_model_is_no_hostility() -> None:
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    fields |= {key: dict.fromkeys(MODULES, 4) for key in ("rank_pattern", "alpha_pattern")}
    config = read_config(json.dumps(fields).encode())
    assert all(config.rank_and_scale(name) == (4, 1.0) for name in MODULES)


def test_an_expression_for_each_layer_is_no_hostility() -> None:
    patterns = {rf".*layers\.{n}\.self_attn\.[qv]_proj": n + 1 for n in range(80)}
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    fields |= {"rank_pattern": patterns, "alpha_pattern": patterns}
    config = read_config(json.dumps(fields).encode())
    ranks = [config.rank_and_scale(name)[0] for name in MODULES[: 80 * 7] if "q_proj" in name]
    assert ranks == list(range(1, 81))


keys = st.text("ab_.", min_size=1, max_size=4) | st.sampled_from(("^a", "a$", r"\.", "a.b", ".*b"))


@settings(max_examples=400, deadline=None)
@given(st.lists(keys, max_size=4, unique=True), st.text("ab_.", min_size=1, max_size=8))
def test_the_first_pattern_that_matches_says_it(patterns: list[str], name: str) -> None:
    """As in PEFT's `get_pattern_key`; most are found by look-up."""
    matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
    values = {key: order for order, key in enumerate(patterns)}
    found = FirstMatch.of("rank_pattern", values, Work()).get(name)
    assert found == values.get(next(matching, ""))


@pytest.mark.parametrize(
    "text",
    ["(?=a)b", r"(a)\1", "(?i)a", "(?>a)", "a{99999}", "{", "a{2,1}", "(a", "a)", "*", "a**",
     "[b-a]", "[", "[[a]", "a++", "(?P=x)", "\\",
     "(" * 40 + "a" + ")" * 40, "[a" + "b" * 5000 + "]"],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(text: str) -> None:
    with pytest.raises(AdapterInvalidError, match=r"exclude_modules .*list module names"):
        Pattern("exclude_modules", text)
