"""Chooses each row's next token from its logits. Every row is computed on its own terms.

A draw is a pure function of the request's seed and the token's position: one uniform number a
token, from a counter-based generator, inverted through the row's own distribution. The batch a
row happens to be in never changes it. This module must not know the model, plans or adapters.

Reported log-probabilities are the model's own: before temperature, penalties and filters.

Shapes: S rows to sample, V vocabulary, F rows that need their tokens sorted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lory_server.messages import Sampling
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


def sample(logits_SV: Tensor, rows: Sequence[SampleRow]) -> Samples:
    """logits_SV: float32, changed by nobody. Rows with temperature 0 take the best token."""
    scores_SV = _adjusted(logits_SV, rows)
    token_ids_S = scores_SV.argmax(dim=-1)
    plain = [i for i, row in enumerate(rows) if _draws(row) and not _filters(row.sampling)]
    filtered = [i for i, row in enumerate(rows) if _draws(row) and _filters(row.sampling)]
    for indices, choose in ((plain, _draw), (filtered, _draw_filtered)):
        if indices:
            token_ids_S[indices] = choose(scores_SV[indices], [rows[i] for i in indices])
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


def _draws(row: SampleRow) -> bool:
    return row.sampling.temperature > 0.0


def _filters(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.typical_p < 1.0


# -- scores: bias and penalties ---------------------------------------------------------------


def _adjusted(logits_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Logits with each row's bias and penalties; the same tensor if no row has any."""
    changed = [
        i for i, row in enumerate(rows) if row.history is not None or row.sampling.logit_bias
    ]
    if not changed:
        return logits_SV
    scores_SV = logits_SV.clone()
    for i in changed:
        _adjust(scores_SV[i], rows[i])
    return scores_SV


def _adjust(scores_V: Tensor, row: SampleRow) -> None:
    sampling = row.sampling
    if row.history is not None:
        _penalise_repetition(scores_V, row.history, sampling.repetition_penalty)
        _penalise_answer(scores_V, row.history[row.prompt_len :], sampling)
    if sampling.logit_bias:
        ids, bias = zip(*sampling.logit_bias, strict=True)
        scores_V[list(ids)] += torch.tensor(bias, device=scores_V.device)


def _penalise_repetition(scores_V: Tensor, history: Sequence[int], penalty: float) -> None:
    """CTRL (arXiv 1909.05858): scores of tokens seen are divided, or multiplied below zero."""
    if penalty == 1.0:
        return
    seen = torch.tensor(sorted(set(history)), device=scores_V.device)
    scores = scores_V[seen]
    scores_V[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _penalise_answer(scores_V: Tensor, answer: Sequence[int], sampling: Sampling) -> None:
    """OpenAI's: frequency times count, and presence once, over the answer so far."""
    if not answer or (sampling.frequency_penalty == 0.0 and sampling.presence_penalty == 0.0):
        return
    seen, counts = torch.tensor(answer, device=scores_V.device).unique(return_counts=True)
    scores_V[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty


# -- draws ------------------------------------------------------------------------------------


def _column(rows: Sequence[SampleRow], value: Callable[[SampleRow], float], like: Tensor) -> Tensor:
    return torch.tensor([[value(row)] for row in rows], dtype=like.dtype, device=like.device)


def _invert(probs_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Index of the token in whose share of [0, total) the row's draw falls."""
    cumulative_SV = probs_SV.double().cumsum(dim=-1)
    draws_S1 = _column(rows, lambda row: uniform(row.sampling.seed, row.position), cumulative_SV)
    threshold_S1 = draws_S1 * cumulative_SV[:, -1:]
    index_S = torch.searchsorted(cumulative_SV, threshold_S1, right=True).squeeze(-1)
    # Rounding may leave the threshold on the far edge; the last token with a share takes it.
    last_S = probs_SV.shape[-1] - 1 - (probs_SV.flip(-1) > 0).int().argmax(dim=-1)
    return torch.minimum(index_S, last_S)


def _draw(scores_SV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    temperature_S1 = _column(rows, lambda row: row.sampling.temperature, scores_SV)
    return _invert(torch.softmax(_cooled(scores_SV, temperature_S1), dim=-1), rows)


def _cooled(scores_SV: Tensor, temperature_S1: Tensor) -> Tensor:
    """Scores over temperature, the best at 0, so that no temperature overflows."""
    best_S1 = scores_SV.max(dim=-1, keepdim=True).values
    return (scores_SV - best_S1) / temperature_S1.clamp_min(1e-6)


def _draw_filtered(scores_FV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Temperature, then top-k, top-p, typical-p, each over what the one before it left."""
    temperature_F1 = _column(rows, lambda row: row.sampling.temperature, scores_FV)
    sorted_FV, ids_FV = torch.sort(
        _cooled(scores_FV, temperature_F1), dim=-1, descending=True, stable=True
    )
    rank_V = torch.arange(sorted_FV.shape[-1], device=sorted_FV.device)
    top_k_F1 = _column(rows, lambda row: row.sampling.top_k or sorted_FV.shape[-1], sorted_FV)
    sorted_FV = sorted_FV.masked_fill(rank_V >= top_k_F1, -torch.inf)
    sorted_FV = _keep_top_p(sorted_FV, _column(rows, lambda row: row.sampling.top_p, sorted_FV))
    if any(row.sampling.typical_p < 1.0 for row in rows):
        typical_F1 = _column(rows, lambda row: row.sampling.typical_p, sorted_FV)
        sorted_FV = _keep_typical(sorted_FV, typical_F1)
    index_F = _invert(torch.softmax(sorted_FV, dim=-1), rows)
    return ids_FV.gather(-1, index_F[:, None]).squeeze(-1)


def _keep_top_p(sorted_FV: Tensor, top_p_F1: Tensor) -> Tensor:
    """Nucleus (arXiv 1904.09751): the fewest best tokens whose probability reaches top_p."""
    probs_FV = torch.softmax(sorted_FV, dim=-1)
    before_FV = probs_FV.cumsum(dim=-1) - probs_FV
    # The best token always stays; 1.0 filters nothing, whatever the sum rounds to.
    drop_FV = (before_FV >= top_p_F1) & (top_p_F1 < 1.0)
    drop_FV[:, 0] = False
    return sorted_FV.masked_fill(drop_FV, -torch.inf)


def _keep_typical(sorted_FV: Tensor, typical_p_F1: Tensor) -> Tensor:
    """Locally typical (arXiv 2202.00666): tokens whose surprise is nearest the entropy."""
    logprobs_FV = torch.log_softmax(sorted_FV, dim=-1)
    probs_FV = logprobs_FV.exp()
    entropy_F1 = -(probs_FV * logprobs_FV.nan_to_num(neginf=0.0)).sum(-1, keepdim=True)
    distance_FV = (-logprobs_FV - entropy_F1).abs()
    order_FV = distance_FV.argsort(dim=-1, stable=True)
    ordered_FV = probs_FV.gather(-1, order_FV)
    before_FV = ordered_FV.cumsum(dim=-1) - ordered_FV
    drop_FV = (before_FV >= typical_p_F1) & (typical_p_F1 < 1.0)
    drop_FV[:, 0] = False
    drop_FV = torch.zeros_like(drop_FV).scatter(-1, order_FV, drop_FV)
    return sorted_FV.masked_fill(drop_FV, -torch.inf)
