"""Samples to ids, exactly as a server would make them of the same request.

A prompt is tokenised as the server tokenises it, the answer after it on its own, then the end of
sequence. A conversation is one request for each of the assistant's turns; turns that a later one
repeats token by token are learned there. This module must not know models or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lory_trainer.data import Example, Pair, Row
from lory_trainer.data_rows import MARK, Message, Plan, Sample
from lory_trainer.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer and how it is asked."""

    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    eos_id: int
    stop_ids: frozenset[int]
    """Tokens that end an answer when the base is served, eos_id among them."""
    known_ids: tuple[int, ...]
    """One object for each id: rows hold many of the same."""
    learn_prompt: bool = False

    def opening(self) -> str:
        """What the chat template puts before an answer's own words, to be learned with them."""
        if not self.plan.chat:
            return ""
        asked = ({"role": "user", "content": "a"},)
        said = (*asked, {"role": "assistant", "content": MARK})
        sample = Sample("a chat", asked, "")
        try:
            prompt = self._render(sample, asked, prompt=True)
            whole = self._render(sample, said, prompt=False)
        except DataError:  # it takes other chats than this one
            return ""
        before, found, _ = whole.removeprefix(prompt).partition(MARK)
        return before if found and whole.startswith(prompt) else ""

    def encode(self, sample: Sample) -> Sequence[Row]:
        if self.plan.kind == "text":
            ids = (*self._ids(sample.answer), self.eos_id)
            return [Example(ids, 0)]
        if sample.rejected is not None:
            chosen, rejected = (
                self._answered(sample, answer) for answer in (sample.answer, sample.rejected)
            )
            return [Pair(chosen, rejected)]
        if isinstance(sample.prompt, str):
            return [self._answered(sample, sample.answer)]
        return self._turns(sample, sample.prompt)

    def _ids(self, text: str) -> tuple[int, ...]:
        return self._shared(self.tokenizer.encode(text))

    def _raw_ids(self, text: str) -> tuple[int, ...]:
        return self._shared(self.tokenizer.encode(text, add_special_tokens=False))

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(self.known_ids.__getitem__, ids))

    def _answered(self, sample: Sample, answer: str) -> Example:
        """A prompt and one answer, through the chat template if the plan says so."""
        if not self.plan.chat and isinstance(sample.prompt, str):
            prompt = self._ids(sample.prompt)
            return self._example(prompt, (*self._raw_ids(answer), self.eos_id))
        asked = sample.prompt
        messages = ({"role": "user", "content": asked},) if isinstance(asked, str) else tuple(asked)
        said = (*messages, {"role": "assistant", "content": answer})
        return self._example(*self._turn(sample, said, len(messages)))

    def _example(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
        return Example((*prompt, *answer), 0 if self.learn_prompt else len(prompt))

    def _turns(self, sample: Sample, messages: Sequence[Message]) -> list[Example]:
        """Of an answer before all others, to which nothing asks, nothing is learned."""
        turns = [
            self._turn(sample, messages[: place + 1], place)
            for place, message in enumerate(messages)
            if place and message["role"] == "assistant" and message.get("weight", 1)
        ]
        if not turns:
            raise DataError(
                f"data: {sample.place}: every answer has weight 0, or comes before a question; "
                "nothing to learn"
            )
        examples: list[Example] = []
        spans: list[tuple[int, int]] = []
        for (prompt, answer), later in zip(turns, [*turns[1:], None], strict=True):
            whole = (*prompt, *answer)
            if later is not None and later[0][: len(whole)] == whole:
                spans.append((len(prompt), len(whole)))
                continue
            start = 0 if self.learn_prompt else len(prompt)
            examples.append(Example(whole, start, () if self.learn_prompt else tuple(spans)))
            spans = []
        return examples

    def _turn(
        self, sample: Sample, messages: Sequence[Message], place: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of what comes before messages[place], and of its answer with its end."""
        asked = self._render(sample, messages[:place], prompt=True)
        whole = self._render(sample, messages[: place + 1], prompt=False)
        if not whole.startswith(asked):
            raise DataError(
                f"data: {sample.place}: the base's chat template writes a conversation with its "
                "answer otherwise than the prompt for that answer, so what is learned is not "
                "what would be asked; give template instead of chat"
            )
        answer = self._raw_ids(whole[len(asked) :])
        end = next((i for i, token in enumerate(answer) if token in self.stop_ids), None)
        if end is not None:
            return self._raw_ids(asked), answer[: end + 1]
        content = messages[place].get("content")
        if not isinstance(content, str):
            raise DataError(
                f"data: {sample.place}: the base's chat template ends no turn, so only answers of "
                "plain text can be learned"
            )
        return self._raw_ids(asked), (*self._raw_ids(content), self.eos_id)

    def _render(self, sample: Sample, messages: Sequence[Message], *, prompt: bool) -> str:
        plain = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
        tools: Any = list(sample.tools) or None
        try:
            text = self.tokenizer.apply_chat_template(
                plain, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(
                f"data: {sample.place}: the base's chat template does not take it: {error}"
            ) from error
        return str(text)


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    stop_ids: Sequence[int] = (),
    learn_prompt: bool = False,
) -> Encoder:
    """Raises DataError if the tokenizer cannot end an answer, or has no chat template to use."""
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise DataError(
            "base: its tokenizer names no eos_token; an adapter could not learn to stop"
        )
    if plan.chat and not tokenizer.chat_template:
        raise DataError("base: its tokenizer has no chat template; give template: ... instead")
    known_ids = tuple(range(max(len(tokenizer), eos_id + 1)))
    return Encoder(tokenizer, plan, eos_id, frozenset((eos_id, *stop_ids)), known_ids, learn_prompt)
