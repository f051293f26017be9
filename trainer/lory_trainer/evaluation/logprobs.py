"""Log-probabilities of a wanted answer, from the server: prompt and answer tokenised apart.

It must not know what is made of them.
"""

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.rows import Row
from lory_trainer.evaluation.server import Server, understood
from lory_trainer.evaluation.variants import Variant


def can_be_scored(variant: Variant) -> bool:
    """Not where the prompt is made by a chat template, which only the server has."""
    return variant.kind != "prompt_only" and not variant.is_chat


async def wanted_logprobs(server: Server, variant: Variant, row: Row) -> list[float]:
    """Of each token of the wanted answer, after the prompt that training would have put before."""
    prompt_ids = await _ids(server, variant.prompt(row), special=True)
    wanted_ids = await _ids(server, variant.prefix + row.wanted, special=False)
    if not wanted_ids:
        return []
    body = {
        "model": variant.model,
        "prompt": [[*prompt_ids, *wanted_ids]],
        "max_tokens": 0,
        "echo": True,
        "logprobs": 0,
    }
    reply = await server.post("/v1/completions", body)
    with understood("/v1/completions"):
        found = reply.body["choices"][0]["logprobs"]["token_logprobs"][-len(wanted_ids) :]
    if len(found) != len(wanted_ids) or None in found:
        raise EvaluationError(f"{row.place}: the server did not score every token of the answer")
    return found


async def _ids(server: Server, text: str, special: bool) -> list[int]:
    body = {"inputs": text, "add_special_tokens": special}
    reply = await server.post("/tokenize", body)
    with understood("/tokenize"):
        return [token["id"] for token in reply.body]
