"""Manifests: what of them is acted on, and which refuse their adapter."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_files import write_adapter
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.manner import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    read_manner,
    read_manner_file,
    render,
    template_fields,
)
from lory_server.adapters.store import AdapterStore
from lory_server.messages import NO_MANNER, Defaults, TrainedOn
from lory_trainer import template as trainers
from lory_trainer.errors import ConfigError

DEMO = Path(__file__).parents[1] / "demo"
HEX = "0" * 64


def read(**fields: Any):
    return read_manner(json.dumps({"manifest_version": 1} | fields).encode())


def test_a_manifest_without_anything_to_act_on_is_no_manner():
    assert read() == NO_MANNER
    assert read(base="org/base", training={"loss": [0.5]}, template=None) == NO_MANNER
    assert read_manner_file(None) == NO_MANNER


def test_all_that_is_acted_on_is_read():
    manner = read(
        template="{q} of {who}? {q}",
        fields=["who", "q"],
        generation={"temperature": 0.1, "top_k": 50, "max_new_tokens": 512, "stop": ["\n"]},
        stop=["###", "\n"],
        eos_token="<end>",
        base_files={"config": HEX, "tokenizer": HEX, "weights": HEX, "quantization": {"bits": 4}},
        chat=True,
        chat_template_sha256=HEX,
        completion_prefix=" ",
        probe=[{"unknown": 1}],
    )
    assert manner.fields == ("q", "who")
    assert manner.defaults == Defaults(temperature=0.1, top_k=50, max_new_tokens=512)
    assert manner.stop == ("###", "\n")
    assert (manner.eos_token, manner.is_chat, manner.completion_prefix) == ("<end>", True, " ")
    assert manner.base == TrainedOn(
        config=HEX, tokenizer=HEX, weights=HEX, chat_template=HEX, is_quantized=True
    )


def test_both_versions_of_manifests_are_read():
    assert read(manifest_version=2, template="{a}", fields=["a"], chat=False).fields == ("a",)
    assert read(base_files={"quantization": None}).base == TrainedOn(is_quantized=False)
    assert read(base_files={"tokenizer": HEX}).base == TrainedOn(tokenizer=HEX)


def test_a_digest_is_of_what_is_acted_on_alone():
    first = read(template="{a}")
    assert first.digest
    assert read(template="{a}", training={"loss": 1}).digest == first.digest
    assert read(template="{a} ").digest != first.digest
    assert read(template="{a}", stop=["x"]).digest != first.digest


def test_an_adapter_that_was_not_to_sample_is_greedy():
    manner = read(generation={"do_sample": False, "temperature": 0.7})
    assert manner.defaults.temperature == 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"manifest_version": 3}, "manifest_version"),
        ({"manifest_version": "1"}, "manifest_version"),
        ({"template": 5}, "template"),
        ({"template": "no field"}, "names no field"),
        ({"template": "{text.__class__}"}, "text.__class__"),
        ({"template": "{text[0]}"}, "text"),
        ({"template": "{0}"}, "{0}"),
        ({"template": "{}"}, "template"),
        ({"template": "{text!r}"}, "text"),
        ({"template": "{text:>9999999999}"}, "text"),
        ({"template": "{text:{width}}"}, "text"),
        ({"template": "{" * 50_000}, "template"),
        ({"template": "{a}" + "x" * 70_000}, "longer"),
        ({"template": "{a}", "fields": ["b"]}, "fields"),
        ({"fields": ["b"]}, "fields"),
        ({"fields": "ab"}, "fields"),
        ({"generation": {"num_beams": 4}}, "num_beams"),
        ({"generation": {"temperature": 101}}, "temperature"),
        ({"generation": {"temperature": "hot"}}, "temperature"),
        ({"generation": {"top_p": 0}}, "top_p"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"generation": [1]}, "generation"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"stop": [str(i) for i in range(17)]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"eos_token": "x" * 300}, "eos_token"),
        ({"eos_token": 2}, "eos_token"),
        ({"completion_prefix": "x" * 300}, "completion_prefix"),
        ({"chat": "yes"}, "chat"),
        ({"chat_template_sha256": "x"}, "chat_template_sha256"),
        ({"base_files": {"config": "x", "tokenizer": HEX, "weights": HEX}}, "config"),
        ({"base_files": HEX}, "base_files"),
    ],
)
def test_a_hostile_or_mistaken_manifest_is_refused_by_the_name_of_its_field(fields, named):
    with pytest.raises(AdapterInvalidError, match=MANIFEST_NAME) as refused:
        read(**fields)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"manifest_version": 1',
        b'{"manifest_version": 1, "generation": {"temperature": NaN}}',
        b'{"manifest_version": 1, "generation": {"temperature": 1e999}}',
        b'{"manifest_version": 1, "config": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_manifest_is_refused(raw):
    with pytest.raises(AdapterInvalidError, match=MANIFEST_NAME):
        read_manner(raw)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b'{"name": "support", "files": ["a"], "version": "2.1"}', "`manifest_version`"),
        (b'{"manifest_version": "1.0"}', "manifest_version"),
        (b'{"manifest_version": 3, "template": "{text}"}', "manifest_version is 3"),
        (b'{"manifest_version": 1, "generation": {"num_beams": 4}}', "`num_beams`"),
    ],
)
def test_a_manifest_of_another_writer_is_told_with_the_way_out(raw: bytes, named: str):
    with pytest.raises(AdapterInvalidError, match=f"{named}.*; take the file out of the folder"):
        read_manner(raw)


def test_fields_that_are_for_people_are_passed_over_whatever_they_hold():
    raw = b'{"manifest_version": 1, "metrics": [[{}]], "of_the_future": {"a": 1}, "rank": "x"}'
    assert read_manner(raw) == NO_MANNER


def test_a_manifest_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(AdapterInvalidError, match="larger"):
            read_manner_file(fd)
    finally:
        os.close(fd)


def test_manifests_of_the_trainer_are_read():
    """The demo's adapters are written by `lory train`."""
    for folder in (DEMO / "adapters").iterdir():
        manner = read_manner((folder / MANIFEST_NAME).read_bytes())
        assert (manner.template, manner.fields) == ("{text} ->", ("text",))


TEMPLATES = st.lists(
    st.one_of(
        st.text(alphabet="ab \n{}", max_size=4),
        st.sampled_from(["{a}", "{text}", "{{", "}}", "{a!r}", "{a:1}", "{a.b}", "{}"]),
    ),
    max_size=6,
).map("".join)


@given(TEMPLATES, st.text(), st.text())
def test_server_and_trainer_render_alike(template: str, a: str, text: str):
    """Two implementations, for neither may import the other; train = serve rests on this."""
    values = {"a": a, "b": "B", "ab": "AB", "text": text}
    try:
        fields = trainers.template_fields(template)
    except ConfigError:
        if template_accepts(template):
            assert template_fields(template) == ()
        return
    assert template_fields(template) == fields
    if set(fields) <= set(values):
        assert render(template, values) == trainers.render(template, values)


def template_accepts(template: str) -> bool:
    try:
        template_fields(template)
    except AdapterInvalidError:
        return False
    return True


def test_the_store_finds_manifests_and_sees_them_change(tmp_path):
    write_adapter(tmp_path / "a", 2)
    store = AdapterStore(tmp_path)
    with store.locate("a") as files:
        assert files.manifest_fd is None
        before = files.signature
    (tmp_path / "a" / MANIFEST_NAME).write_text('{"manifest_version": 1, "template": "{x}"}')
    with store.locate("a") as files:
        assert files.signature != before
        assert read_manner_file(files.manifest_fd).template == "{x}"
        (tmp_path / "a" / MANIFEST_NAME).write_text('{"manifest_version": 1}')
        with pytest.raises(AdapterInvalidError, match="changed"):
            files.check_unchanged()


def test_a_manifest_is_not_read_from_outside_the_folder(tmp_path):
    write_adapter(tmp_path / "adapters" / "a", 2)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "adapters" / "a" / MANIFEST_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterInvalidError, match="leaves the adapters folder"):
        AdapterStore(tmp_path / "adapters").locate("a")
