"""Chat templates of adapters: what they make is what the base's templates make, and one that never
ends, or takes all memory, fails alone and soon."""

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from lory_router import template_process
from lory_router.chat_template import ChatTemplate, TemplateError
from lory_router.template_process import AdapterTemplate, TemplateProcess

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if mood %}{{ mood }}{% endif %}{% if add_generation_prompt %}<answer>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "h\u00e9 {{ 7 * 6 }}"}, {"role": "system", "content": ""}]


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process._end()


def child_of(process: TemplateProcess) -> "subprocess.Popen[bytes]":
    assert process._running is not None
    return process._running._process


@pytest.mark.parametrize("options", [None, {"mood": "!"}, {"mood": ["a", {"b": None}]}])
def test_an_adapter_s_template_makes_what_the_base_s_would(
    process: TemplateProcess, options: dict[str, object] | None
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
    process: TemplateProcess, source: str, says: str
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
    process: TemplateProcess, source: str, says: str
) -> None:
    template = AdapterTemplate(process, source, {})
    other = AdapterTemplate(process, TEMPLATE, {})
    with pytest.raises(TemplateError, match=says):
        template.render(MESSAGES, {"n": 10**10})
    assert other.render(MESSAGES).startswith("<user>")


def test_a_template_that_took_too_long_is_not_tried_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = TemplateProcess()
    template = AdapterTemplate(process, "{{ n ** n }}", {})
    with pytest.raises(TemplateError, match=r"more than 1 s to render$"):
        template.render([], {"n": 10**10})
    assert process._running is None
    with pytest.raises(TemplateError, match="a moment ago"):
        template.render([], {"n": 2})
    assert process._running is None
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 31)
    assert template.render([], {"n": 2}) == "4"
    process._end()


def test_a_process_that_was_lost_is_followed_by_another() -> None:
    process = TemplateProcess()
    template = AdapterTemplate(process, "a", {})
    child_of(process).kill()
    child_of(process).wait()
    assert template.render([]) == "a"
    child = child_of(process)
    del template, process
    assert child.wait(10) == -9


def test_a_process_ends_with_its_router() -> None:
    process = TemplateProcess()
    assert AdapterTemplate(process, "a", {}).render([]) == "a"
    assert process._running is not None
    process._running._connection.close()
    assert child_of(process).wait(10) == 0
    process._end()


def test_the_event_loop_goes_on_while_a_template_is_stuck(process: TemplateProcess) -> None:
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
    process = TemplateProcess()
    template = AdapterTemplate(process, "{{ 'a' * 100 }}", {})
    monkeypatch.setattr(template_process, "MAX_FRAME_BYTES", 50)
    with pytest.raises(TemplateError, match="broke the process"):
        template.render([])
    process._end()
