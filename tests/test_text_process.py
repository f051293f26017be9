"""Chat templates of adapters, rendered apart: they make what the base's would, and one that never
ends, or takes all memory, fails alone and soon. Their tokenizers' files are judged there as here.
"""

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lory_router import text_process
from lory_router.chat_template import ChatTemplate, TemplateError
from lory_router.own_texts import OwnTexts
from lory_router.text_process import AdapterTemplate, TextProcess, Wish
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.tokenizer_files import tokenizer_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if mood %}{{ mood }}{% endif %}{% if add_generation_prompt %}<answer>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "h\u00e9 {{ 7 * 6 }}"}, {"role": "system", "content": ""}]


@pytest.fixture(scope="module")
def process() -> Iterator[TextProcess]:
    process = TextProcess()
    yield process
    process._end()


def child_of(process: TextProcess) -> "subprocess.Popen[bytes]":
    assert process._running is not None
    return process._running._process


@pytest.mark.parametrize("options", [None, {"mood": "!"}, {"mood": ["a", {"b": None}]}])
def test_an_adapter_s_template_makes_what_the_base_s_would(
    process: TextProcess, options: dict[str, object] | None
) -> None:
    tokens = {"eos_token": "</s>"}
    own, base = AdapterTemplate(process, TEMPLATE, tokens), ChatTemplate(TEMPLATE, tokens)
    assert own.render(MESSAGES, options) == base.render(MESSAGES, options)
    assert own.source == TEMPLATE


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for %}", "does not compile"),
        ("{{ '" + "((" * 5000 + "' }}{{ " + "(" * 5000 + ")" * 5000 + " }}", "compile|deep"),
        ("{% if x %}{{ 10**(10**10) }}{% endif %}", "more than 1 s"),
    ],
    ids=["syntax", "nested", "endless"],
)
def test_what_cannot_be_compiled_in_bounds_is_refused(
    process: TextProcess, source: str, says: str
) -> None:
    """Constants are computed when a template is compiled."""
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"chat_template: .*({says})"):
        AdapterTemplate(process, source, {})
    assert time.monotonic() - began < 20
    assert AdapterTemplate(process, "ok", {}).render([]) == "ok"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * n }}", "memory"),
        ("{{ n ** n }}", "more than 1 s"),
        ("{{ 'a' * 9000000 }}", "more than 8388608 characters"),
        ("{{ '\\ud800' }}", "surrogates"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply"),
    ],
    ids=["complains", "sandbox", "memory", "endless", "output", "half", "recursion"],
)
def test_what_cannot_be_rendered_in_bounds_fails_alone(
    process: TextProcess, source: str, says: str
) -> None:
    template = AdapterTemplate(process, source, {})
    other = AdapterTemplate(process, TEMPLATE, {})
    with pytest.raises(TemplateError, match=says):
        template.render(MESSAGES, {"n": 10**10})
    assert other.render(MESSAGES).startswith("<user>")


def test_a_template_that_took_too_long_is_not_tried_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = TextProcess()
    template = AdapterTemplate(process, "{{ n ** n }}", {})
    with pytest.raises(TemplateError, match=r"more than 1 s to render$"):
        template.render([], {"n": 10**10})
    assert process._running is None
    with pytest.raises(TemplateError, match="a moment ago"):
        template.render([], {"n": 2})
    assert process._running is None
    monkeypatch.setattr(process._refused, "_clock", lambda: time.monotonic() + 31)
    assert template.render([], {"n": 2}) == "4"
    process._end()


def test_a_process_that_was_lost_is_followed_by_another() -> None:
    process = TextProcess()
    template = AdapterTemplate(process, "a", {})
    child_of(process).kill()
    child_of(process).wait()
    assert template.render([]) == "a"
    child = child_of(process)
    del template, process
    assert child.wait(10) == -9


def test_a_process_ends_with_its_router() -> None:
    process = TextProcess()
    assert AdapterTemplate(process, "a", {}).render([]) == "a"
    assert process._running is not None
    process._running._connection.close()
    assert child_of(process).wait(10) == 0
    process._end()


def test_the_event_loop_goes_on_while_a_template_is_stuck(process: TextProcess) -> None:
    template = AdapterTemplate(process, "{{ n ** n ** 2 }}", {})

    async def story() -> float:
        rendering = asyncio.ensure_future(asyncio.to_thread(template.render, [], {"n": 10**6}))
        longest, last = 0.0, time.monotonic()
        while not rendering.done():
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        with pytest.raises(TemplateError):
            await rendering
        return longest

    assert asyncio.run(story()) < 0.5
    assert threading.active_count() < 20


def test_a_frame_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TextProcess()
    template = AdapterTemplate(process, "{{ 'a' * 100 }}", {})
    monkeypatch.setattr(text_process, "MAX_FRAME_BYTES", 50)
    with pytest.raises(TemplateError, match="broke the process"):
        template.render([])
    process._end()


FILE = {"model": {"type": "BPE", "vocab": {"a": 0, "\u00e9": 1}, "merges": ["a b"]}}


def test_a_tokenizer_s_files_are_judged_there_as_here(process: TextProcess, tmp_path: Path) -> None:
    files = {"tokenizer.json": json.dumps(FILE).encode(), "chat_template.jinja": b"{{ 1 }}"}
    files["tokenizer_config.json"] = b'{"eos_token": "a"}'
    assert AdapterTemplate(process, "ok", {}).render([]) == "ok"
    here, num_open = tokenizer_of(files), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with ExitStack() as opened:
            descriptors: dict[str, int] = {}
            for name, raw in files.items():
                (tmp_path / name).write_bytes(raw)
                descriptors[name] = opened.enter_context((tmp_path / name).open("rb")).fileno()
            assert process.look(descriptors) == replace(here, raw=b"")
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": 3}')
    with (
        (tmp_path / "tokenizer.json").open("rb") as file,
        pytest.raises(AdapterInvalidError, match="has no vocabulary"),
    ):
        process.look({"tokenizer.json": file.fileno()})
    assert len(os.listdir("/proc/self/fd")) == num_open
    assert len(os.listdir(f"/proc/{child_of(process).pid}/fd")) < 10


def test_a_look_that_is_lost_refuses_its_adapter_and_is_followed_by_others(tmp_path: Path) -> None:
    process = TextProcess()
    (tmp_path / "tokenizer.json").write_text(json.dumps(FILE))
    with (tmp_path / "tokenizer.json").open("rb") as file:
        descriptors = {"tokenizer.json": file.fileno()}
        process.look(descriptors)
        assert process._running is not None
        process._running._connection.shutdown(socket.SHUT_RDWR)
        with pytest.raises(AdapterInvalidError, match="takes too long to read"):
            process.look(descriptors)
        assert process.look(descriptors).num_tokens == 2
    process._end()


def test_strangers_programs_run_without_the_servers_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORY_API_KEY", "secret-key")
    base: Any = None
    apart = OwnTexts(base, "", 2)._apart
    assert apart.ask(Wish("{{ 6 * 7 }}", {}, [])) == "42"
    environment = Path(f"/proc/{child_of(apart).pid}/environ").read_bytes()
    apart._end()
    assert b"PATH=" in environment
    assert b"secret-key" not in environment
