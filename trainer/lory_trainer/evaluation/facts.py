"""What a server tells of itself and of an adapter: context, template, fields, stop texts.

It must not know what is asked afterwards.
"""

from dataclasses import dataclass
from urllib.parse import quote

from lory_trainer.evaluation.errors import EvaluationError, ServerError
from lory_trainer.evaluation.server import Json, Server, understood


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    adapter_id: str
    template: str = ""
    """Empty: it has none, or its server does not tell."""
    fields: tuple[str, ...] = ()
    is_chat: bool = False
    """What the template makes goes through the base's chat template."""
    completion_prefix: str = ""
    """What its answers begin with, and wanted ones do not."""
    stop: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    """Its own limit of an answer."""
    base_matches: bool | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    base_name: str
    max_model_len: int | None


async def server_facts(server: Server) -> ServerFacts:
    """The first model listed is the base."""
    reply = await server.get("/v1/models")
    models = reply.body.get("data") if isinstance(reply.body, dict) else None
    if not models:
        raise EvaluationError(f"{server.url}: GET /v1/models lists no base; is this Lory?")
    with understood("/v1/models"):
        return ServerFacts(models[0]["id"], models[0].get("max_model_len"))


async def adapter_facts(server: Server, adapter_id: str) -> AdapterFacts:
    """One from a source (`hub:org/name`) may be unknown until it is asked something."""
    path = f"/v1/adapters/{quote(adapter_id, safe='/:@')}"
    try:
        told: Json = (await server.get(path)).body
    except ServerError as error:
        if error.status != 404:
            raise
        if ":" in adapter_id:
            return AdapterFacts(adapter_id)
        raise EvaluationError(
            f"{server.url} serves no adapter {adapter_id!r}; `lory adapters` lists what it does"
        ) from error
    with understood(path):
        return _facts(adapter_id, told)


def _facts(adapter_id: str, told: Json) -> AdapterFacts:
    if told.get("refused"):
        raise EvaluationError(f"adapter {adapter_id!r} is refused: {told['refused']}")
    return AdapterFacts(
        adapter_id,
        template=told.get("template") or "",
        fields=tuple(told.get("fields") or ()),
        is_chat=bool(told.get("chat")),
        completion_prefix=told.get("completion_prefix") or "",
        stop=tuple(told.get("stop") or ()),
        max_new_tokens=(told.get("defaults") or {}).get("max_new_tokens"),
        base_matches=told.get("base_matches"),
    )
