"""The flags of `lory eval`, and which of them are keys of an evaluation.

It must not know what is done with them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class EvalFlags:
    """None: not given."""

    data: Annotated[str | None, typer.Argument(help="File of held-out rows.")] = None
    config: Annotated[
        Path | None, typer.Option(help="YAML with an `evaluation:` section; flags go before it.")
    ] = None
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter to evaluate; the first is the candidate.")
    ] = None
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two adapters, or revisions of one, instead.", metavar="A B"),
    ] = None
    against: Annotated[
        list[str] | None, typer.Option(help="Who else is asked: base (unless told), prompt_only.")
    ] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="exact_match, normalized_match, contains, regex=PATTERN, label, rouge_l, bleu,"
            " perplexity, json_valid, json_fields, json_schema=FILE; the first decides."
        ),
    ] = None
    gate: Annotated[
        list[str] | None, typer.Option(help="What has to hold, such as 'exact_match > base'.")
    ] = None
    completion: Annotated[str | None, typer.Option(help="Column of the wanted answer.")] = None
    template: Annotated[
        str | None, typer.Option(help="Prompt template of an adapter that brings none.")
    ] = None
    instruction: Annotated[str | None, typer.Option(help="What prompt_only says first.")] = None
    shots: Annotated[int | None, typer.Option(help="Examples that prompt_only shows.")] = None
    shots_from: Annotated[str | None, typer.Option(help="File that examples come from.")] = None
    style: Annotated[str | None, typer.Option(help="Of prompt_only: text or chat.")] = None
    rows: Annotated[int | None, typer.Option(help="Ask only so many rows.")] = None
    seed: Annotated[int | None, typer.Option(help="Of examples, resamples and draws.")] = None
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None
    generation: Annotated[
        str | None, typer.Option(help="greedy, or served: by the adapter's own defaults.")
    ] = None
    concurrency: Annotated[int | None, typer.Option(help="Most requests at once.")] = None
    price_per_hour: Annotated[
        float | None, typer.Option(help="Of the server's machine; without it no costs.")
    ] = None
    judge_url: Annotated[str | None, typer.Option(help="A judge's OpenAI-style endpoint.")] = None
    judge_model: Annotated[str | None, typer.Option(help="The judge's model.")] = None
    judge_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", show_default=False, help="The judge's key.")
    ] = ""
    base: Annotated[
        str, typer.Option(help="Start a server of this base instead of asking one.")
    ] = ""
    adapters: Annotated[str, typer.Option(help="Its folder of adapters.")] = ""
    serve_flags: Annotated[
        str, typer.Option(help="More flags for it, such as '--dtype float32'.")
    ] = ""
    output: Annotated[Path | None, typer.Option(help="Write all of it as JSON.")] = None
    page: Annotated[Path | None, typer.Option(help="Write a page of HTML.")] = None
    record: Annotated[
        bool,
        typer.Option("--record", help="Write the scores into the candidate's manifest."),
    ] = False
    publish: Annotated[
        str,
        typer.Option(
            metavar="NAME@ALIAS",
            help="What is to stand for the candidate's revision if every gate holds; without"
            " --gate, if it beats all it is compared with.",
        ),
    ] = ""

    def keys(self) -> dict[str, Any]:
        """Those that are keys of `EvaluationOptions`, where they were given."""
        same = ("data", "completion", "template", "rows", "seed", "max_new_tokens")
        more = ("generation", "concurrency", "price_per_hour")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*same, *more)}
        found |= {
            "adapters": self.adapter or None,
            "compare": self.against or None,
            "metrics": self.metric or None,
            "gate": self.gate or None,
        }
        if self.compare is not None:
            found |= {"adapters": list(self.compare), "compare": self.against or []}
        shown = _given(
            instruction=self.instruction,
            shots=self.shots,
            shots_from=self.shots_from,
            style=self.style,
        )
        found["prompt_only"] = shown or None
        found["judge"] = _given(url=self.judge_url, model=self.judge_model) or None
        return _given(**found)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
