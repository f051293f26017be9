"""Log-probabilities of a wanted answer, from the server: prompt and answer tokenised apart.

It must not know what is made of them.
"""

from collections.abc import Sequence

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.rendered import rendered, text_ids
from lory_trainer.evaluation.rows import Row
from lory_trainer.evaluation.server import Server, understood
from lory_trainer.evaluation.variants import Variant, asked_of, is_through_template


def can_be_scored(variant: Variant) -> bool:
    """Not where the answer may begin as it likes."""
    return variant.kind != "prompt_only"


async def wanted_logprobs(server: Server, variant: Variant, row: Row) -> list[float]:
    """Of each token of the wanted answer, after the prompt that training would have put before."""
    prompt_ids = await _prompt_ids(server, variant, row)
    learned = variant.prefix + row.wanted if row.learned is None else row.learned
    wanted_ids = await text_ids(server, variant, learned, special=False)
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


async def _prompt_ids(server: Server, variant: Variant, row: Row) -> Sequence[int]:
    if is_through_template(variant, row):
        return (await rendered(server, variant, row, asked_of(variant, row))).ids
    return await text_ids(server, variant, variant.prompt(row), special=True)
