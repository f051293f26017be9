"""Patterns match exactly what `re` matches, and none can make the server wait."""

import json
import re
import time
from string import ascii_letters

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lory_server.adapters.config import read_config
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.pattern import Pattern

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


def test_work_is_bounded_over_all_patterns_of_an_adapter() -> None:
    """Each pattern had a bound of its own, and what its leaves cost was not counted: a folder with
    two hundred held a loader for minutes."""
    classes = [f"[{a}{b}]" for a in ascii_letters for b in ascii_letters if a != b]
    patterns = {f"({'|'.join(classes[i : i + 500])}){i}": 4 for i in range(200)}
    raw = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": patterns})
    started_s = time.monotonic()
    with pytest.raises(AdapterInvalidError, match="takes too long"):
        read_config(raw.encode()).rank_and_scale("model.layers.0.self_attn.q_proj")
    assert time.monotonic() - started_s < 10


def test_a_rank_for_each_module_of_a_large_model_is_no_hostility() -> None:
    names = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(126) for part in "qkvoGUD"]
    fields = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    fields |= {key: dict.fromkeys(names, 4) for key in ("rank_pattern", "alpha_pattern")}
    config = read_config(json.dumps(fields).encode())
    assert all(config.rank_and_scale(name) == (4, 1.0) for name in names)


@pytest.mark.parametrize(
    "text",
    ["(?=a)b", r"(a)\1", "(?i)a", "(?>a)", "a{99999}", "{", "a{2,1}", "(a", "a)", "*", "a**",
     "[b-a]", "[", "[[a]", "a++", "(?P=x)", "\\",
     "(" * 40 + "a" + ")" * 40, "[a" + "b" * 5000 + "]"],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(text: str) -> None:
    with pytest.raises(AdapterInvalidError, match=r"exclude_modules .*list module names"):
        Pattern("exclude_modules", text)
