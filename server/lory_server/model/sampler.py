"""Chooses each row's next token from its logits. Every row is computed on its own terms.

A draw is a pure function of the request's seed and the token's position: one uniform number a
token, from a counter-based generator, inverted through the row's own distribution. The batch a
row happens to be in never changes it. This module must not know the model, adapters, or of a plan
more than its `SampleRow`s.

Reported log-probabilities are the model's own: before temperature, penalties and filters.

Shapes: S rows to sample, V vocabulary, D rows that draw, N changed scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lory_server.messages import Sampling
from lory_server.model.staging import Array, Send
from lory_server.plan import SampleRow

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Samples:
    """One token a row and its probability: drawn, or given and scored."""

    token_ids_S: Tensor
    """int64."""
    logprobs_S: Tensor
    """float32; NaN where the row's logits were not finite."""
    top_ids_SK: Tensor | None
    top_logprobs_SK: Tensor | None
    """K most likely tokens, best first, if any row asked."""


def uniform(seed: int, position: int) -> float:
    """The draw for one position: splitmix64 of seed and position, in [0, 1) with 53 bits."""
    state = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    # A second round, so that nearby seeds at shifted positions share nothing.
    state = ((state ^ (state >> 31)) + seed * 0xD1342543DE82EF95) & _MASK
    state = ((state ^ (state >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    state = ((state ^ (state >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return ((state ^ (state >> 32)) >> 11) / (1 << 53)


def sample(logits_SV: Tensor, rows: Sequence[SampleRow], send: Send) -> Samples:
    """logits_SV: float32, changed by nobody. Rows with temperature 0 take the best token.

    What rows ask for goes to the device in one call of `send`; nothing waits for the device.
    """
    arrays = _adjustments(rows, logits_SV.shape[-1]) | _draws(rows, logits_SV.shape[-1])
    there = send(arrays) if arrays else {}
    scores_SV = _adjusted(logits_SV, there)
    token_ids_S = scores_SV.argmax(dim=-1)
    for kind, choose in (("plain_D", _draw), ("filtered_D", _draw_filtered)):
        if kind in there:
            rows_D = there[kind]
            drawn_D = choose(scores_SV.index_select(0, rows_D), _columns(there, rows_D))
            token_ids_S.index_copy_(0, rows_D, drawn_D)
    return score(logits_SV, token_ids_S, max(row.sampling.num_top_logprobs for row in rows))


def score(logits_SV: Tensor, token_ids_S: Tensor, num_top: int) -> Samples:
    """The given tokens' log-probabilities, and those of the `num_top` most likely beside them."""
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    top_logprobs_SK, top_ids_SK = logprobs_SV.topk(num_top, dim=-1) if num_top else (None, None)
    return Samples(
        token_ids_S=token_ids_S,
        logprobs_S=logprobs_SV.gather(-1, token_ids_S[:, None]).squeeze(-1),
        top_ids_SK=top_ids_SK,
        top_logprobs_SK=top_logprobs_SK,
    )


# -- scores: bias and penalties ---------------------------------------------------------------

Change = tuple[Sequence[int] | Array, Sequence[float] | Array]
"""Tokens, each once, and a number for each."""


def _adjustments(rows: Sequence[SampleRow], vocab_size: int) -> dict[str, Array]:
    """For each kind of change that any row wants: places in the flat scores, and numbers."""
    arrays: dict[str, Array] = {}
    if not any(row.history is not None or row.sampling.logit_bias for row in rows):
        return arrays
    kinds = (("repeated", _repeated), ("answered", _answered), ("biased", _biased))
    for kind, changes_of in kinds:
        found = [(row, changes_of(one)) for row, one in enumerate(rows)]
        changes = [(row, change) for row, change in found if change is not None]
        if changes:
            places = [np.asarray(ids, np.int64) + row * vocab_size for row, (ids, _) in changes]
            numbers = [np.asarray(by, np.float32) for _, (_, by) in changes]
            arrays |= {f"{kind}_N": np.concatenate(places), f"{kind}_by_N": np.concatenate(numbers)}
    return arrays


def _repeated(row: SampleRow) -> Change | None:
    """CTRL (arXiv 1909.05858): scores of tokens seen are divided, or multiplied below zero."""
    penalty = row.sampling.repetition_penalty
    if row.history is None or penalty == 1.0:
        return None
    seen = np.unique(np.asarray(row.history, np.int64))
    return seen, np.full(len(seen), penalty)


def _answered(row: SampleRow) -> Change | None:
    """OpenAI's: frequency times count, and presence once, over the answer so far."""
    frequency, presence = row.sampling.frequency_penalty, row.sampling.presence_penalty
    answer = () if row.history is None else row.history[row.prompt_len :]
    if not answer or (frequency == 0.0 and presence == 0.0):
        return None
    seen, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
    return seen, frequency * counts + presence


def _biased(row: SampleRow) -> Change | None:
    bias = dict(row.sampling.logit_bias)
    return (list(bias), list(bias.values())) if bias else None


def _adjusted(logits_SV: Tensor, there: Mapping[str, Tensor]) -> Tensor:
    """Logits with each row's bias and penalties; the same tensor if no row has any."""
    kinds = (("repeated", _penalised), ("answered", torch.sub), ("biased", torch.add))
    wanted = [(kind, change) for kind, change in kinds if f"{kind}_N" in there]
    if not wanted:
        return logits_SV
    scores_SV = logits_SV.clone(memory_format=torch.contiguous_format)
    flat = scores_SV.view(-1)
    for kind, change in wanted:
        places_N, by_N = there[f"{kind}_N"], there[f"{kind}_by_N"]
        flat.index_copy_(0, places_N, change(flat.index_select(0, places_N), by_N))
    return scores_SV


def _penalised(scores_N: Tensor, penalty_N: Tensor) -> Tensor:
    return torch.where(scores_N > 0, scores_N / penalty_N, scores_N * penalty_N)


# -- draws ------------------------------------------------------------------------------------


_COLUMNS = ("uniform", "temperature", "top_k", "top_p", "typical_p")


def _columns(there: Mapping[str, Tensor], rows_D: Tensor) -> dict[str, Tensor]:
    """What D of the rows ask for, as columns."""
    known = [name for name in _COLUMNS if f"{name}_S" in there]
    return {name: there[f"{name}_S"].index_select(0, rows_D)[:, None] for name in known}


def _draws(rows: Sequence[SampleRow], vocab_size: int) -> dict[str, Array]:
    """Which rows draw, and with what; nothing if none does."""
    drawing = [i for i, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if not drawing:
        return {}
    samplings = [row.sampling for row in rows]
    filtered = [i for i in drawing if _filters(samplings[i])]
    plain = [i for i in drawing if not _filters(samplings[i])]
    draws = np.zeros(len(rows))
    draws[drawing] = [uniform(samplings[i].seed, rows[i].position) for i in drawing]
    temperatures = np.array([one.temperature for one in samplings], np.float32)
    arrays: dict[str, Array] = {"uniform_S": draws, "temperature_S": temperatures}
    if plain:
        arrays["plain_D"] = np.array(plain, np.int64)
    if filtered:
        arrays["filtered_D"] = np.array(filtered, np.int64)
        arrays["top_k_S"] = np.array([one.top_k or vocab_size for one in samplings], np.int64)
        arrays["top_p_S"] = np.array([one.top_p for one in samplings], np.float32)
    if any(samplings[i].typical_p < 1.0 for i in filtered):
        arrays["typical_p_S"] = np.array([one.typical_p for one in samplings], np.float32)
    return arrays


def _filters(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.typical_p < 1.0


def _invert(probs_DV: Tensor, uniform_D1: Tensor) -> Tensor:
    """Index of the token in whose share of [0, total) the row's draw falls."""
    cumulative_DV = probs_DV.double().cumsum(dim=-1)
    threshold_D1 = uniform_D1 * cumulative_DV[:, -1:]
    index_D = torch.searchsorted(cumulative_DV, threshold_D1, right=True).squeeze(-1)
    # Rounding may leave the threshold on the far edge; the last token with a share takes it.
    last_D = probs_DV.shape[-1] - 1 - (probs_DV.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(index_D, last_D)


def _draw(scores_DV: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    cooled_DV = _cooled(scores_DV, columns["temperature"])
    return _invert(torch.softmax(cooled_DV, dim=-1), columns["uniform"])


def _cooled(scores_DV: Tensor, temperature_D1: Tensor) -> Tensor:
    """Scores over temperature, the best at 0, so that no temperature overflows."""
    best_D1 = scores_DV.max(dim=-1, keepdim=True).values
    return (scores_DV - best_D1) / temperature_D1.clamp_min(1e-6)


def _draw_filtered(scores_DV: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """Temperature, then top-k, top-p, typical-p, each over what the one before it left."""
    sorted_DV, ids_DV = torch.sort(
        _cooled(scores_DV, columns["temperature"]), dim=-1, descending=True, stable=True
    )
    rank_V = torch.arange(sorted_DV.shape[-1], device=sorted_DV.device)
    sorted_DV = sorted_DV.masked_fill(rank_V >= columns["top_k"], -torch.inf)
    sorted_DV = _keep_top_p(sorted_DV, columns["top_p"])
    if "typical_p" in columns:
        sorted_DV = _keep_typical(sorted_DV, columns["typical_p"])
    index_D = _invert(torch.softmax(sorted_DV, dim=-1), columns["uniform"])
    return ids_DV.gather(-1, index_D[:, None]).squeeze(-1)


def _keep_top_p(sorted_DV: Tensor, top_p_D1: Tensor) -> Tensor:
    """Nucleus (arXiv 1904.09751): the fewest best tokens whose probability reaches top_p."""
    probs_DV = torch.softmax(sorted_DV, dim=-1)
    # In float64, as the draw: float32 sums of one row and of many differ on a GPU.
    before_DV = probs_DV.double().cumsum(dim=-1) - probs_DV
    # The best token always stays; 1.0 filters nothing, whatever the sum rounds to.
    drop_DV = (before_DV >= top_p_D1) & (top_p_D1 < 1.0)
    drop_DV[:, 0].fill_(False)
    return sorted_DV.masked_fill(drop_DV, -torch.inf)


def _keep_typical(sorted_DV: Tensor, typical_p_D1: Tensor) -> Tensor:
    """Locally typical (arXiv 2202.00666): tokens whose surprise is nearest the entropy."""
    logprobs_DV = torch.log_softmax(sorted_DV, dim=-1)
    probs_DV = logprobs_DV.exp()
    entropy_D1 = -(probs_DV * logprobs_DV.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
    distance_DV = (-logprobs_DV - entropy_D1).abs()
    order_DV = distance_DV.argsort(dim=-1, stable=True)
    ordered_DV = probs_DV.gather(-1, order_DV)
    before_DV = ordered_DV.cumsum(dim=-1) - ordered_DV
    drop_DV = (before_DV >= typical_p_D1) & (typical_p_D1 < 1.0)
    drop_DV[:, 0].fill_(False)
    drop_DV = torch.zeros_like(drop_DV).scatter(-1, order_DV, drop_DV)
    return sorted_DV.masked_fill(drop_DV, -torch.inf)
