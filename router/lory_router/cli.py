"""The `lory` command: one function per sub-command, each of which calls the module that does it.

It must stay quick to import: what a command needs is imported when it runs.
"""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from lory_router import __version__
from lory_router.caller_options import caller_key_option, server_url_option
from lory_router.config import (
    CommandError,
    ServeConfig,
    check_environment,
    check_switches,
    serve_option,
    serve_parameters,
    wait_politely,
)

RENAMED = {
    "--adapter-memory-fraction": "--adapter-memory",
    "--enable-prefix-caching": "--prefix-caching",
    "--gpu-memory-utilization": "--memory",
    "--hostname": "--host",
    "--max-active-adapters": "--max-resident-adapters",
    "--max-batch-prefill-tokens": "--max-step-tokens",
    "--max-concurrent-requests": "--max-queued",
    "--max-loras": "--max-resident-adapters",
    "--max-num-batched-tokens": "--max-step-tokens",
    "--max-num-queued-reqs": "--max-queued",
    "--max-num-seqs": "--max-batch-rows",
    "--max-total-tokens": "--max-model-len",
    "--model-id": "--model",
    "--quantization": "--quantize",
    "--shutdown-timeout": "--drain-timeout",
}
"""What LoRAX and vLLM call our flags, for people who come from there."""

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose arguments, --help too, belong to another parser."""


Of = Annotated[
    list[str] | None,
    typer.Option(metavar="ADAPTER=WEIGHT", help="To merge: what from; several times."),
]
Method = Annotated[str, typer.Option(help="To merge: linear unless given.")]
Density = Annotated[float | None, typer.Option(help="To merge: the share of numbers kept.")]
Sign = Annotated[str, typer.Option(help="To merge by signs: total or frequency.")]
Rank = Annotated[int | None, typer.Option(help="To merge by svd: rank of the result.")]
Seed = Annotated[int | None, typer.Option(help="To merge by dare_linear or dare_ties.")]


class _Command(TyperCommand):
    """Says only what is wrong with a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


class _ServeCommand(_Command):
    """Knows the names other servers give to our flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            name = argument.partition("=")[0]
            if name in RENAMED:
                ctx.fail(f"No such option: {name} (here it is {RENAMED[name]})")
        check_switches()
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="lory",
    help="Serve many fine-tunes of one base model from one device.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console command; what a person got wrong is one line, not a traceback."""
    try:
        app(prog_name="lory")
    except CommandError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lory {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


# -- serve and demo -------------------------------------------------------------------------


def _serve(**flags: Any) -> None:
    """Serve a base and its adapters over HTTP.

    Every option can also be set as LORY_<NAME>, as shown beside it. SIGTERM or Ctrl-C lets running
    requests finish and exits with 0; a second one ends at once with 128 + the signal's number.
    """
    check_environment()
    config = ServeConfig.from_flags(flags)
    from lory_router import serve

    raise typer.Exit(serve.run(config))


_serve.__signature__ = inspect.Signature(serve_parameters())  # type: ignore[attr-defined]
_serve.__annotations__ = {item.name: item.annotation for item in serve_parameters()}
app.command("serve", cls=_ServeCommand)(_serve)


@app.command(cls=_Command)
def demo(
    base: Annotated[Path | None, typer.Option(help="Folder of the base.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of its adapters.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON file of sample prompts.")] = None,
    host: str = serve_option("host"),
    port: int | None = serve_option(
        "port", default=None, help="Port to listen on: 8080, and with --check a free one."
    ),
    price_per_hour: float = serve_option(
        "price_per_hour", default=1.0, help="Example price of the machine's hour; 0: no costs."
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Ask every adapter, compare the answers, and stop.")
    ] = False,
) -> None:
    """Serve the small base and adapters that come with the repository."""
    check_environment(command="demo", taken=("host", "port", "price_per_hour"))
    from lory_router.demo import DemoFiles, run_demo

    files = DemoFiles.find(base, adapters, prompts)
    flags = {"host": host, "price_per_hour": price_per_hour}
    raise typer.Exit(run_demo(files, flags, port=port, check=check))


# -- talking to a running server ------------------------------------------------------------


@app.command()
def chat(
    adapter: Annotated[str, typer.Argument(help="Adapter to talk to; none: the base.")] = "",
    url: str = server_url_option(),
    api_key: str = caller_key_option(),
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest answer in tokens; unset: 512, or what the context has."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0 is greedy; unset: 0 with an adapter, 0.7 without."),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue raw text: no chat template, no memory.")
    ] = False,
) -> None:
    """Talk to an adapter in the terminal. Inside, /help lists what else can be typed."""
    from lory_router.chat import ChatOptions, run_chat

    options = ChatOptions(adapter, system, max_tokens, temperature, plain)
    raise typer.Exit(run_chat(url, api_key, options))


@app.command()
def adapters(
    deed: Annotated[
        Literal["list", "show", "load", "unload", "pin", "unpin", "register", "merge", "delete"],
        typer.Argument(help="What to do; without it, list."),
    ] = "list",
    name: Annotated[
        str,
        typer.Argument(help="Adapter, name@alias or name@revision; of list, a pattern as 'ft-*'."),
    ] = "",
    adapter: Annotated[str, typer.Option(help="For register: what the name stands for.")] = "",
    revision: Annotated[str, typer.Option(help="For register: which revision of it.")] = "",
    owner: Annotated[str, typer.Option(help="For register: tenant that it is for alone.")] = "",
    of: Of = None,
    method: Method = "",
    density: Density = None,
    sign: Sign = "",
    rank: Rank = None,
    seed: Seed = None,
    url: str = server_url_option(),
    api_key: str = caller_key_option(),
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
) -> None:
    """List what a running server serves; pin, name, merge, delete one."""
    from lory_router.adapter_commands import check_arguments, do, given, merge_wish
    from lory_router.chat import show_adapters

    registered = given(adapter_id=adapter, revision=revision, owner=owner)
    merged = merge_wish(of, method, density, sign, rank, seed)
    wish = check_arguments(deed, name, registered, merged)
    if deed == "list":
        show_adapters(url, api_key, pattern=name, as_json=as_json)
    else:
        do(url, api_key, deed, name, wish, as_json=as_json)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not be there.")],
    of: Annotated[
        list[str], typer.Option(metavar="ADAPTER=WEIGHT", help="What from; several times.")
    ],
    model: Annotated[str, typer.Option(help="The base: a folder or a hub id.")],
    adapters: Annotated[Path, typer.Option(help="Folder with the adapters.")],
    method: Method = "",
    density: Density = None,
    sign: Sign = "",
    rank: Rank = None,
    seed: Seed = None,
) -> None:
    """Merge adapters into a new folder, without a server."""
    from lory_router.adapter_commands import merge_wish
    from lory_router.merge_command import run_merge

    wish = merge_wish(of, method, density, sign, rank, seed)
    raise typer.Exit(run_merge(out, model, adapters, wish))


# -- other parts of the house ---------------------------------------------------------------


@app.command(context_settings=PASS_ON)
def train(context: typer.Context) -> None:
    """Train an adapter from a YAML file (see lory train --help)."""
    wait_politely()
    try:
        trainer = importlib.import_module("lory_trainer.cli")
    except ModuleNotFoundError as error:
        raise CommandError(
            f"training needs {error.name}; install it with: pip install '.[train]' in the checkout"
        ) from error
    trainer_app = typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    trainer_app.command()(trainer.train)
    trainer_app(context.args, prog_name="lory train")


@app.command("eval", context_settings=PASS_ON)
def evaluate(context: typer.Context) -> None:
    """Score adapters on held-out rows (see lory eval --help)."""
    module = importlib.import_module("lory_trainer.evaluation.cli")
    eval_app = typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    command = module.command(server_url_option("--server"), caller_key_option())
    eval_app.command()(command)
    eval_app(context.args, prog_name="lory eval")


@app.command(context_settings=PASS_ON)
def bench(context: typer.Context) -> None:
    """Measure a running server (see lory bench --help)."""
    raise typer.Exit(importlib.import_module("lory_router.bench.command").main(context.args))


if __name__ == "__main__":
    main()
