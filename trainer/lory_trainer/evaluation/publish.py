"""Lets an alias stand for what was evaluated, once every gate holds.

It must not know metrics: what holds is told.
"""

from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.results import Evaluation
from lory_trainer.evaluation.server import Server


async def publish(server: Server, result: Evaluation, alias: str) -> str:
    """The revision that `alias` (name@alias) stands for from now on: the one that answered."""
    candidate = result.variant(result.candidate)
    assert candidate is not None
    if not candidate.revision:
        raise EvaluationError(f"the server told no revision of {result.candidate!r}")
    adapter_id = result.candidate.partition("@")[0]
    body = {"name": alias, "adapter_id": adapter_id, "revision": candidate.revision}
    await server.post("/v1/adapters", body)
    return candidate.revision
