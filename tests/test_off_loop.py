"""Replies of many tokens are made in a thread, those of few where they are."""

import threading
from typing import Any

import pytest

from lory_router import lorax, off_loop, openai
from scripted_engine import BASE, Answer, Front


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each look at many tokens, whether it was in the event loop's own thread."""
    found: list[bool] = []
    monkeypatch.setattr(off_loop, "MOST_ON_LOOP", 100)

    def noting(look: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            found.append(threading.current_thread() is threading.main_thread())
            return look(*arguments)

        return noted

    for module, name in (
        (openai, "completion_logprobs"),
        (openai, "prompt_logprobs"),
        (openai, "chat_logprobs"),
        (lorax, "_prefill"),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    return found


def ask(num_tokens: int, **wish: Any) -> Any:
    sent = {"model": BASE, "max_tokens": num_tokens, "ignore_eos": True, **wish}
    path = "/v1/completions" if "prompt" in wish else "/v1/chat/completions"
    return Front(Answer(b"hi", repeats=True)).post(path, sent).json()["choices"]


@pytest.mark.parametrize(
    "wish",
    [
        {"prompt": "a" * 40, "echo": True, "logprobs": 5},
        {"prompt": ["a" * 40, "b" * 40], "echo": True, "logprobs": 5},
        {"messages": [{"role": "user", "content": "ab"}], "logprobs": True, "top_logprobs": 10},
    ],
)
def test_many_alternatives_are_told_off_the_loop(threads: list[bool], wish: dict[str, Any]):
    """A harness that scores 64 prompts at a time held up all streams for more than a second."""
    choices = ask(20, **wish)
    assert threads
    assert not any(threads)
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    assert all(choice["logprobs"] for choice in choices)


def test_a_few_are_told_at_once(threads: list[bool]):
    ask(2, prompt="ab", echo=True, logprobs=5)
    assert threads
    assert all(threads)


@pytest.mark.parametrize(("num_prompt", "at_once"), [(4, True), (60, False)])
def test_a_prompts_own_tokens_are_told_likewise(
    threads: list[bool], num_prompt: int, at_once: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(off_loop, "MOST_ON_LOOP", 50)
    parameters = {"decoder_input_details": True, "max_new_tokens": 2}
    sent = {"inputs": "a" * num_prompt, "parameters": parameters}
    reply = Front().post("/generate", sent).json()
    assert len(reply["details"]["prefill"]) == num_prompt
    assert threads == [at_once]
