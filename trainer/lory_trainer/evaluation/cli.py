"""`lory eval DATA`: flags in, a table on the terminal, files and an exit code out.

Exit codes: 0, 1 for what went wrong, 3 where a gate fails, 130 when interrupted. Importing this
module must stay cheap.
"""

import asyncio
import dataclasses
import inspect
import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lory_trainer.errors import TrainerError
from lory_trainer.evaluation.errors import EvaluationError
from lory_trainer.evaluation.flags import EvalFlags
from lory_trainer.evaluation.gate import Gate, parse_gate
from lory_trainer.evaluation.options import EvaluationOptions, read_options
from lory_trainer.evaluation.own_server import serving
from lory_trainer.evaluation.page import page
from lory_trainer.evaluation.publish import publish
from lory_trainer.evaluation.record import record
from lory_trainer.evaluation.results import Evaluation, GateResult
from lory_trainer.evaluation.run import Watch, evaluate
from lory_trainer.evaluation.server import Server
from lory_trainer.evaluation.table import show

JUDGE_TIMEOUT_S = 120.0
EXIT_FAILED = 1
EXIT_GATE = 3
EXIT_INTERRUPTED = 130

BY_CHANCE = 0.05
"""What is published unasked must be better by more than that."""
FIGURE_OF = {"label": "label.accuracy", "json_schema": "json_schema.valid"}
"""What gates call metrics of other names."""


def command(url_option: Any, key_option: Any) -> Callable[..., None]:
    """The command, for typer; how server and key are named is told by whoever registers it."""

    def evaluate_adapters(*, server: str, api_key: str, **values: Any) -> None:
        """Score base and adapters on held-out rows, through the server."""
        raise typer.Exit(run(EvalFlags(**values), server, api_key))

    keyword = inspect.Parameter.KEYWORD_ONLY
    more = [
        inspect.Parameter("server", keyword, default=url_option, annotation=str),
        inspect.Parameter("api_key", keyword, default=key_option, annotation=str),
    ]
    known = inspect.signature(EvalFlags).parameters.values()
    parameters = [*(one.replace(kind=keyword) for one in known), *more]
    evaluate_adapters.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    hints = get_type_hints(EvalFlags, include_extras=True)
    evaluate_adapters.__annotations__ = {**hints, "server": str, "api_key": str}
    return evaluate_adapters


def run(flags: EvalFlags, url: str, api_key: str) -> int:
    """The exit code."""
    try:
        options = read_options(flags.config, flags.keys())
        _check(flags)
        gates = [parse_gate(text) for text in _gates(options, flags.publish)]
        with _server_of(flags, url) as served:
            result, verdicts = asyncio.run(_evaluate(options, gates, flags, served, api_key))
    except TrainerError as error:
        _complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    show(Console(), result, verdicts)
    if result.judge_error:
        _complain(f"the judge: {result.judge_error}; the other figures stand")
        return EXIT_FAILED
    return 0 if all(gate.holds for gate in verdicts) else EXIT_GATE


def _complain(text: str) -> None:
    Console(stderr=True).print(
        f"error: {text}", style="red", highlight=False, markup=False, soft_wrap=True
    )


def _gates(options: EvaluationOptions, alias: str) -> list[str]:
    """What is published has to be better than what it is compared with."""
    if options.gate or not alias:
        return list(options.gate)
    main = options.metrics[0].partition("=")[0]
    sign = "<" if main == "perplexity" else ">"
    others = (*options.compare, *options.adapters[1:])
    if not others:
        raise EvaluationError("--publish needs a --gate, or something that it is better than")
    return [f"{FIGURE_OF.get(main, main)} {sign} {name} (p < {BY_CHANCE})" for name in others]


def _check(flags: EvalFlags) -> None:
    if bool(flags.base) != bool(flags.adapters):
        raise EvaluationError("--base and --adapters go together; or name a server by --url")
    if flags.serve_flags and not flags.base:
        raise EvaluationError("--serve-flags is for a server that --base starts")
    if flags.record and not flags.base:
        raise EvaluationError("--record needs the folder that is served: --base and --adapters")
    if flags.base and flags.publish:
        raise EvaluationError("--publish needs the server at --url that is to serve it")
    if flags.publish and not all(flags.publish.rpartition("@")):
        raise EvaluationError(f"--publish {flags.publish}: give name@alias, such as support@prod")
    if flags.compare and flags.adapter:
        raise EvaluationError("--compare names both adapters; leave --adapter out")
    if flags.compare and flags.compare[0] == flags.compare[1]:
        raise EvaluationError("--compare: give two adapters, or two revisions of one")


def _server_of(flags: EvalFlags, url: str) -> AbstractContextManager[str]:
    if not flags.base:
        return nullcontext(url)
    return serving(flags.base, flags.adapters, shlex.split(flags.serve_flags))


async def _evaluate(
    options: EvaluationOptions, gates: list[Gate], flags: EvalFlags, url: str, api_key: str
) -> tuple[Evaluation, list[GateResult]]:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(url, api_key, options.concurrency))
        judge = None
        if options.judge is not None:
            own = Server(
                options.judge.url,
                flags.judge_key,
                options.concurrency,
                answer_timeout_s=JUDGE_TIMEOUT_S,
            )
            judge = await stack.enter_async_context(own)
        with _progress() as watch:
            result = await evaluate(options, server, judge, watch, gates)
        verdicts = _judged(result, gates, flags)
        if flags.publish and not result.judge_error and all(one.holds for one in verdicts):
            revision = await publish(server, result, flags.publish)
            told = f"{flags.publish} stands for revision {revision}"
            Console(stderr=True).print(told, markup=False, highlight=False)
        return result, verdicts


def _judged(result: Evaluation, gates: list[Gate], flags: EvalFlags) -> list[GateResult]:
    """Written before anything is published; what was answered is kept though a gate is wrong."""
    verdicts: list[GateResult] = []
    try:
        verdicts.extend(gate.check(result) for gate in gates)
    finally:
        _write(result, verdicts, flags)
    if flags.record:
        record(Path(flags.adapters), result, verdicts)
    return verdicts


@contextmanager
def _progress() -> Iterator[Watch]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def watch(name: str, num_done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=num_done)

        yield watch


def _write(result: Evaluation, gates: list[GateResult], flags: EvalFlags) -> None:
    if flags.output is not None:
        told = {**dataclasses.asdict(result), "gates": [dataclasses.asdict(g) for g in gates]}
        _write_text(flags.output, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    if flags.page is not None:
        _write_text(flags.page, page(result, gates))


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written: {error.strerror}") from error
