"""An evaluation from end to end: what there is, who is asked, their answers, what they are worth.

    facts -> variants -> answers, variant after variant -> metrics, pairs, gates' figures

It must not know terminals, files to write or how a server was started.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from lory_trainer.evaluation import judge
from lory_trainer.evaluation.catalogue import make_metrics
from lory_trainer.evaluation.errors import EvaluationError, ServerError
from lory_trainer.evaluation.facts import AdapterFacts, ServerFacts, adapter_facts, server_facts
from lory_trainer.evaluation.gate import Gate
from lory_trainer.evaluation.labels import confusion
from lory_trainer.evaluation.logprobs import can_be_scored, wanted_logprobs
from lory_trainer.evaluation.metrics import Measured, Metric
from lory_trainer.evaluation.options import BASE, PROMPT_ONLY, EvaluationOptions
from lory_trainer.evaluation.rendered import as_learned, rendered
from lory_trainer.evaluation.results import (
    Confusion,
    Evaluation,
    JudgedPair,
    RowResult,
    Spent,
    VariantResult,
)
from lory_trainer.evaluation.rows import DataSet, Row, pick_shots, read_data
from lory_trainer.evaluation.server import Server, understood
from lory_trainer.evaluation.statistics import Estimate, Pairing, estimate, pair, percentile
from lory_trainer.evaluation.variants import (
    Answer,
    Prompting,
    Sampling,
    Variant,
    adapter_variant,
    asked_messages,
    base_variant,
    is_said_in_ids,
    is_through_template,
    prompt_only_variant,
    read_answer,
    request,
)
from lory_trainer.template import template_fields

SPARE_TOKENS = 8
"""Beyond one for each byte of the longest wanted answer."""

Watch = Callable[[str, int, int], None]
"""Told who is asked, how many answers there are, and of how many."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One variant's answers, and what metrics made of them."""

    variant: Variant
    answers: Sequence[Answer]
    wall_s: float
    measured: Mapping[str, Sequence[Measured]]
    """By metric; those that this variant can have."""


async def evaluate(
    options: EvaluationOptions,
    server: Server,
    judge_server: Server | None,
    watch: Watch,
    gates: Sequence[Gate] = (),
) -> Evaluation:
    """Raises EvaluationError, which says how far it came. Gates are only looked at for names."""
    if not options.adapters:
        raise EvaluationError("name an adapter to evaluate, by --adapter or in the configuration")
    _check_file(options)
    facts = await server_facts(server)
    adapters = [await adapter_facts(server, name) for name in dict.fromkeys(options.adapters)]
    data = read_data(
        Path(options.data), options.completion, options.rows, _fields(options, adapters[0])
    )
    variants = _variants(options, data, facts, adapters)
    data = await _as_learned(server, variants, data)
    metrics = make_metrics(options.metrics, [row.wanted for row in data.rows])
    _check(variants, data.rows, metrics)
    for gate in gates:
        gate.check_names(variants[0].name, _figures(variants, metrics, options))
    sampling = Sampling(
        options.seed, _longest(options, data, facts, adapters), options.generation == "greedy"
    )
    asked = [await _ask(one, data.rows, sampling, metrics, server, watch) for one in variants]
    judged, judge_error = await _judge(options, data.rows, asked, judge_server, watch)
    result = _evaluation(options, data, facts, adapters, sampling, metrics, asked, judged, server)
    return replace(result, judge_error=judge_error)


def _check_file(options: EvaluationOptions) -> None:
    """Before a server is asked anything."""
    if not Path(options.data).exists():
        raise EvaluationError(f"there is no file {options.data}")


def _fields(options: EvaluationOptions, candidate: AdapterFacts) -> tuple[str, ...]:
    """The columns that its template names."""
    if candidate.template:
        return candidate.fields
    return template_fields(options.template) if options.template else ()


async def _as_learned(server: Server, variants: Sequence[Variant], data: DataSet) -> DataSet:
    """Answers as the chat template writes them, where it is what the candidate was trained by."""
    candidate = variants[0]
    if not is_through_template(candidate, data.rows[0]):
        return data
    found = await server.ask_all(
        "the answers as learned", data.rows, partial(as_learned, server, candidate), lambda _: None
    )
    return replace(data, rows=tuple(found))


def _variants(
    options: EvaluationOptions,
    data: DataSet,
    facts: ServerFacts,
    adapters: Sequence[AdapterFacts],
) -> list[Variant]:
    """The candidate first."""
    is_conversation = bool(data.rows[0].messages)
    if options.template and is_conversation:
        raise EvaluationError("template: conversations are asked as they are; leave it out")
    if options.template and all(one.template for one in adapters):
        names = ", ".join(one.adapter_id for one in adapters)
        raise EvaluationError(f"template: {names} has one of its own; leave --template out")
    found = [
        adapter_variant(one, options.template, is_conversation=is_conversation) for one in adapters
    ]
    if BASE in options.compare:
        found.append(base_variant(facts.base_name, found[0]))
    if PROMPT_ONLY in options.compare:
        prompting = _prompting(options, data, found[0])
        wanted = [row.wanted for row in data.rows]
        found.append(prompt_only_variant(facts.base_name, found[0], prompting, wanted))
    names = [variant.name for variant in found]
    if len(set(names)) < len(names):
        raise EvaluationError(f"an adapter is called as another variant is: {', '.join(names)}")
    return found


def _check(variants: Sequence[Variant], rows: Sequence[Row], metrics: Sequence[Metric]) -> None:
    """Before anything is asked: every row has what prompts take, every metric can be had."""
    for variant in variants:
        for row in rows:
            variant.prompt(row)
            if variant.sends_fields and is_said_in_ids(variant, row):
                raise EvaluationError(
                    f"{row.place}: tools and calls go through a chat template, and"
                    f" {variant.name!r} was trained by one of its own; leave the row out"
                )
    for metric in metrics:
        if metric.may_refuse:
            for row in rows:
                metric.measure(row.wanted, row.wanted)
        if metric.source == "logprobs" and rows[0].messages and variants[0].sends_fields:
            raise EvaluationError(
                f"{metric.name}: is not to be had of conversations with {variants[0].name!r}, which"
                " has a template of its own; give rows of its fields, or leave it out"
            )


def _figures(
    variants: Sequence[Variant], metrics: Sequence[Metric], options: EvaluationOptions
) -> dict[str, list[str]]:
    """Which there will be of each variant."""
    spent = [field.name for field in fields(Spent)]
    if not options.price_per_hour:
        spent = [name for name in spent if not name.startswith("cost_")]
    found: dict[str, list[str]] = {}
    for variant in variants:
        is_scored = can_be_scored(variant)
        names = [one.name for one in metrics if one.source == "answer" or is_scored]
        found[variant.name] = [*names, *spent]
    return found


def _prompting(options: EvaluationOptions, data: DataSet, like: Variant) -> Prompting:
    wish, shots = options.prompt_only, []
    if wish.shots:
        source = Path(wish.shots_from or options.data)
        fields = template_fields(template) if (template := like.template) else ()
        rows = read_data(source, options.completion, fields=fields).rows
        shots = pick_shots(rows, wish.shots, data.rows, options.seed)
    is_chat = wish.style == "chat" or bool(data.rows[0].messages)
    return Prompting(wish.instruction, tuple(shots), is_chat)


def _longest(
    options: EvaluationOptions,
    data: DataSet,
    facts: ServerFacts,
    adapters: Sequence[AdapterFacts],
) -> int:
    """How many tokens an answer may have: as told, or room for every wanted one."""
    own = options.max_new_tokens or adapters[0].max_new_tokens
    if own is not None:
        return own
    prefix = adapters[0].completion_prefix
    learned = (prefix + row.wanted if row.learned is None else row.learned for row in data.rows)
    bytes_of_longest = max(len(text.encode()) for text in learned)
    half_a_context = (facts.max_model_len or 2**20) // 2
    return max(1, min(bytes_of_longest + SPARE_TOKENS, half_a_context))


async def _ask(
    variant: Variant,
    rows: Sequence[Row],
    sampling: Sampling,
    metrics: Sequence[Metric],
    server: Server,
    watch: Watch,
) -> _Asked:
    started_s = time.perf_counter()
    tell = partial(_tell, watch, variant.name, len(rows))
    answer = partial(_answer, server, variant, sampling)
    answers: list[Answer] = await server.ask_all(variant.name, rows, answer, tell)
    wall_s = time.perf_counter() - started_s
    _check_revision(variant, answers)
    measured: dict[str, list[Measured]] = {}
    for metric in metrics:
        if metric.source == "answer":
            pairs = zip(answers, rows, strict=True)
            measured[metric.name] = [metric.measure(got.text, row.wanted) for got, row in pairs]
        elif can_be_scored(variant):
            score = partial(wanted_logprobs, server, variant)
            found = await server.ask_all(variant.name, rows, score, tell)
            pairs = zip(found, rows, strict=True)
            measured[metric.name] = [metric.measure(got, row.wanted) for got, row in pairs]
    return _Asked(variant, answers, wall_s, measured)


def _tell(watch: Watch, name: str, total: int, num_done: int) -> None:
    watch(name, num_done, total)


async def _answer(server: Server, variant: Variant, sampling: Sampling, row: Row) -> Answer:
    ids: Sequence[int] = ()
    if is_said_in_ids(variant, row):
        ids = (await rendered(server, variant, row, asked_messages(variant, row))).ids
    path, body = request(variant, row, sampling, ids)
    try:
        reply = await server.post(path, body)
    except ServerError as error:
        raise ServerError(f"{row.place}: {error}", error.status) from error
    with understood(path):
        return read_answer(variant, row, reply)


def _check_revision(variant: Variant, answers: Sequence[Answer]) -> None:
    revisions = {answer.revision for answer in answers}
    if variant.kind == "adapter" and len(revisions) > 1:
        raise EvaluationError(
            f"adapter {variant.name!r} was replaced while it was evaluated; start again"
        )


async def _judge(
    options: EvaluationOptions,
    rows: Sequence[Row],
    asked: Sequence[_Asked],
    server: Server | None,
    watch: Watch,
) -> tuple[list[JudgedPair], str]:
    """What it said, and why it was asked no further: an hour of answers is not lost with it."""
    found: list[JudgedPair] = []
    if options.judge is None or server is None:
        return found, ""
    model, first = options.judge.model, asked[0]
    for other in asked[1:]:
        contests = [
            judge.Contest(first.variant.prompt(row), row.wanted, mine.text, theirs.text)
            for row, mine, theirs in zip(rows, first.answers, other.answers, strict=True)
        ]
        name = f"judge: {first.variant.name} or {other.variant.name}"
        ask = partial(_verdict, server, model, options.seed)
        tell = partial(_tell, watch, name, len(rows))
        try:
            verdicts = await server.ask_all(name, contests, ask, tell)
        except EvaluationError as error:
            return found, str(error)
        found.append(judge.tally(model, first.variant.name, other.variant.name, verdicts))
    return found, ""


async def _verdict(server: Server, model: str, seed: int, contest: judge.Contest) -> judge.Verdict:
    return await judge.verdict(server, model, contest, seed)


# -- what it is worth -----------------------------------------------------------------------


def _evaluation(
    options: EvaluationOptions,
    data: DataSet,
    facts: ServerFacts,
    adapters: Sequence[AdapterFacts],
    sampling: Sampling,
    metrics: Sequence[Metric],
    asked: Sequence[_Asked],
    judged: Sequence[JudgedPair],
    server: Server,
) -> Evaluation:
    return Evaluation(
        data=data.name,
        data_sha256=data.sha256,
        server=server.url,
        base=facts.base_name,
        base_matches=adapters[0].base_matches,
        seed=options.seed,
        is_greedy=sampling.is_greedy,
        max_new_tokens=sampling.max_new_tokens,
        concurrency=server.concurrency,
        price_per_hour=options.price_per_hour,
        candidate=asked[0].variant.name,
        main_metric=metrics[0].name,
        lower_is_better=tuple(m.name for m in metrics if not m.is_better_high),
        variants=tuple(_variant_result(one, metrics, options) for one in asked),
        pairings=tuple(_pairings(metrics, asked)),
        judged=tuple(judged),
        judge_error="",
        rows=tuple(_row_results(data.rows, metrics[0], asked)),
    )


def _variant_result(
    asked: _Asked, metrics: Sequence[Metric], options: EvaluationOptions
) -> VariantResult:
    known = [metric for metric in metrics if metric.name in asked.measured]
    scores = {m.name: _estimate(m, asked.measured[m.name], options.seed) for m in known}
    main = asked.measured.get(metrics[0].name, ())
    num_correct = sum(map(metrics[0].row_score, main)) if metrics[0].source == "answer" else 0.0
    return VariantResult(
        name=asked.variant.name,
        kind=asked.variant.kind,
        revision=asked.answers[0].revision,
        scores=scores,
        spent=_spent(asked, num_correct, options.price_per_hour),
        num_cut=sum(answer.is_cut for answer in asked.answers),
        confusion=_confusion(asked),
    )


def _estimate(metric: Metric, measured: Sequence[Measured], seed: int) -> Estimate:
    scores = [metric.row_score(row) for row in measured] if metric.scale == "rows" else ()
    is_bounded = metric.scale != "free"
    return estimate(measured, metric.total, seed, scores=scores, is_bounded=is_bounded)


def _spent(asked: _Asked, num_correct: float, price_per_hour: float) -> Spent:
    latencies = sorted(answer.seconds for answer in asked.answers)
    num_prompt = sum(answer.num_prompt_tokens for answer in asked.answers)
    num_generated = sum(answer.num_tokens for answer in asked.answers)
    cost = price_per_hour / 3600 * asked.wall_s
    num_tokens = num_prompt + num_generated
    return Spent(
        latency_p50_s=percentile(latencies, 0.5),
        latency_p95_s=percentile(latencies, 0.95),
        prompt_tokens=num_prompt,
        generated_tokens=num_generated,
        wall_s=asked.wall_s,
        cost_per_million_tokens=cost / num_tokens * 1e6 if price_per_hour else None,
        cost_per_correct=cost / num_correct if price_per_hour and num_correct else None,
    )


def _confusion(asked: _Asked) -> Confusion | None:
    labelled = asked.measured.get("label.accuracy")
    return None if labelled is None else confusion(labelled)


def _pairings(metrics: Sequence[Metric], asked: Sequence[_Asked]) -> list[Pairing]:
    first, found = asked[0], []
    for metric in metrics:
        for other in asked[1:]:
            if metric.name in other.measured:
                pairs = zip(first.measured[metric.name], other.measured[metric.name], strict=True)
                scores = [(metric.row_score(a), metric.row_score(b)) for a, b in pairs]
                found.append(pair(metric.name, first.variant.name, other.variant.name, scores))
    return found


def _row_results(rows: Sequence[Row], metric: Metric, asked: Sequence[_Asked]) -> list[RowResult]:
    def scores(index: int) -> dict[str, Any]:
        known = [one for one in asked if metric.name in one.measured]
        return {o.variant.name: metric.row_score(o.measured[metric.name][index]) for o in known}

    return [
        RowResult(
            place=row.place,
            values=row.values,
            wanted=row.wanted,
            answers={one.variant.name: one.answers[index].text for one in asked},
            scores=scores(index),
        )
        for index, row in enumerate(rows)
    ]
