"""Who pays for a step: splits the wall time between two commits among the rows that shared it.

The split follows a fixed analytic model, so that a request's charge depends on what it asked for
and not on measurement noise of its row. Charges of a step sum to its wall time. This module is
pure arithmetic; it must not know torch, clocks or prices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lory_server.messages import Charge, Submit
from lory_server.plan import BASE_SLOT, PlanRow


@dataclass(frozen=True, slots=True)
class CostModel:
    """Relative work of one token at a given context, in units of the base's linears.

        work = 1 + context / balance_context + token_params / base_params
        and of each row of logits of an adapter that changes the head: head_params / base_params

    The linears cost 2 flops a parameter; attention costs 4 flops a layer, query width and context
    position (q.k and p.v), so both are equal at `balance_context`. A head of an adapter's own, or
    factors on the base's, are read and multiplied beside it, for the rows that use them alone; of
    factors on the embedding a token takes one column of A, not a product over the vocabulary.
    """

    base_params: int
    balance_context: float

    @classmethod
    def of(cls, base_params: int, num_layers: int, query_width: int) -> "CostModel":
        return cls(base_params, base_params / (2 * num_layers * query_width))

    def work(self, start: int, num_tokens: int, token_params: int) -> float:
        """Work of positions [start, start + num_tokens) of one sequence."""
        mean_context = start + (num_tokens + 1) / 2
        per_token = 1 + mean_context / self.balance_context + token_params / self.base_params
        return num_tokens * per_token

    def head_work(self, num_logits: int, head_params: int) -> float:
        """Work of so many rows of logits through what an adapter changes of the head."""
        return num_logits * head_params / self.base_params


@dataclass(frozen=True, slots=True)
class Share:
    """One row of a committed step, as far as its cost is concerned."""

    request_id: int
    tenant: str
    adapter_id: str
    work: float
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class AdapterWork:
    """What an adapter adds to a row that it acts on."""

    token_params: int = 0
    """That each token takes a product with."""
    head_params: int = 0
    """That each row of logits does."""


NO_WORK = AdapterWork()


def row_share(command: Submit, row: PlanRow, adapter: AdapterWork, cost_model: CostModel) -> Share:
    """Rows that the base computes, before an aLoRA acts, cost what the base's do."""
    start, num_tokens = row.start, len(row.token_ids)
    acting = NO_WORK if row.slot == BASE_SLOT else adapter
    num_logits = int(row.sample is not None) + len(row.targets)
    work = cost_model.work(start, num_tokens, acting.token_params)
    return Share(
        request_id=command.request_id,
        tenant=command.tenant,
        adapter_id=command.charged_as or command.adapter_id,
        work=work + cost_model.head_work(num_logits, acting.head_params),
        prompt_tokens=max(min(start + num_tokens, len(command.prompt_ids)) - start, 0),
        generated_tokens=int(row.sample is not None),
    )


def charge(wall_seconds: float, shares: Sequence[Share]) -> tuple[Charge, ...]:
    """Splits `wall_seconds` in proportion to work; what rounding leaves goes to the last row."""
    total = math.fsum(share.work for share in shares)
    charges: list[Charge] = []
    left = wall_seconds
    for i, share in enumerate(shares):
        last = i == len(shares) - 1
        seconds = left if last else wall_seconds * share.work / total
        left -= seconds
        charges.append(
            Charge(
                share.request_id,
                share.tenant,
                share.adapter_id,
                max(seconds, 0.0),
                share.prompt_tokens,
                share.generated_tokens,
            )
        )
    return tuple(charges)
