"""What the server's chat template makes of a conversation: the prompt, and the answer as learned.

The trainer learns what the template writes from the end of the prompt on: perhaps an opening, then
the answer, its calls in a form of the template's own. It must not know metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lory_trainer.data_rows import MARK, Message
from lory_trainer.evaluation.errors import EvaluationError, ServerError
from lory_trainer.evaluation.rows import Row
from lory_trainer.evaluation.server import Json, Server, understood
from lory_trainer.evaluation.variants import Variant, asked_of, said_of


@dataclass(frozen=True, slots=True)
class Rendered:
    text: str
    ids: tuple[int, ...]


async def rendered(
    server: Server,
    variant: Variant,
    row: Row,
    messages: Sequence[Message],
    *,
    is_prompt: bool = True,
) -> Rendered:
    """`messages` are asked with the row's tools."""
    body: Json = {"messages": list(messages), "add_generation_prompt": is_prompt}
    body |= {"tools": list(row.tools)} if row.tools else {}
    try:
        reply = await server.post("/tokenize", body | _whose(variant))
    except ServerError as error:
        raise ServerError(f"{row.place}: {error}", error.status) from error
    with understood("/tokenize"):
        return Rendered(reply.body["prompt"], tuple(reply.body["tokens"]))


async def text_ids(server: Server, variant: Variant, text: str, *, special: bool) -> list[int]:
    body = {"inputs": text, "add_special_tokens": special}
    reply = await server.post("/tokenize", body | _whose(variant))
    with understood("/tokenize"):
        return [token["id"] for token in reply.body]


def _whose(variant: Variant) -> Json:
    """Tokenizer and template; adapters may bring their own."""
    return {"adapter_id": variant.model} if variant.kind == "adapter" else {}


async def as_learned(server: Server, variant: Variant, row: Row) -> Row:
    """With the answer as the template writes it, for a variant that was trained through it."""
    asked, said = list(asked_of(variant, row)), said_of(variant, row)
    marked = {"role": "assistant", "content": MARK}
    before = (await rendered(server, variant, row, asked)).text
    whole = (await rendered(server, variant, row, [*asked, said], is_prompt=False)).text
    frame = (await rendered(server, variant, row, [*asked, marked], is_prompt=False)).text
    opening, found, end = frame.removeprefix(before).partition(MARK)
    if not (found and whole.startswith(before) and whole.endswith(end)):
        if "tool_calls" not in said:
            return row
        raise EvaluationError(
            f"{row.place}: the chat template writes a conversation with its answer otherwise than"
            " the prompt for it, so there is no telling what was learned; leave the row out"
        )
    learned = whole.removeprefix(before).removesuffix(end)
    opening = opening if learned.startswith(opening) else ""
    wanted = learned.removeprefix(opening)
    if wanted != said.get("content"):
        wanted = await _shown(server, variant, wanted)
    return replace(
        row,
        wanted=wanted.removeprefix(variant.prefix),
        opening=await _shown(server, variant, opening),
        learned=learned,
    )


async def _shown(server: Server, variant: Variant, text: str) -> str:
    """As answers show it: without special tokens."""
    ids = await text_ids(server, variant, text, special=False) if text else []
    if not ids:
        return ""
    body = {"model": variant.model, "prompt": [ids], "max_tokens": 0, "echo": True}
    reply = await server.post("/v1/completions", body)
    with understood("/v1/completions"):
        return reply.body["choices"][0]["text"]
