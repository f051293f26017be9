"""POST /v1/adapters/merge: a merge that has a name.

It must not know what is done with the wish (`merges`).
"""

from starlette.routing import Route

from lory_router.adapters import PATH
from lory_router.bodies import read_object, read_struct, refuse_unknown
from lory_router.endpoint import Endpoint, Front
from lory_router.exchange import Exchange
from lory_router.merges import Merges
from lory_router.schemas_adapters import MergeBody, WeightedAdapter


class MergeRoutes:
    def __init__(self, front: Front, merges: Merges) -> None:
        self._front = front
        self._merges = merges

    def routes(self) -> list[Route]:
        """To stand before those of adapters, one of which may be called `merge`."""
        answer = Endpoint(self._front, PATH, "openai", self.save)
        return [Route(f"{PATH}/merge", answer, methods=["POST"])]

    async def save(self, front: Front, exchange: Exchange, body: bytes) -> None:
        value = read_object(body)
        refuse_unknown(value, MergeBody)
        parts = value.get("adapters")
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict):
                refuse_unknown(part, WeightedAdapter, inside=f"adapters[{index}].")
        reply, is_new = await self._merges.save(exchange.caller, read_struct(value, MergeBody))
        await exchange.reply_json(reply, 201 if is_new else 200)
