"""`lory merge OUT`: adapters merged into a PEFT folder, without a server.

The work is a program of the engine's; this one checks what was asked. It must not know the
arithmetic or files' formats.
"""

import subprocess
import sys
from pathlib import Path

import msgspec
import typer

from lory_router.adapter_commands import Wish
from lory_router.config import CommandError
from lory_router.errors import ApiError
from lory_router.merging import check_saved
from lory_router.schemas_adapters import MergeBody
from lory_router.settings import RouterSettings
from lory_server.recipes import Recipe

COMMAND = (sys.executable, "-m", "lory_server.merge_folder")


def run_merge(out: Path, model: str, adapters: Path, wish: Wish) -> int:
    """The exit code; what is wrong is told on stderr."""
    try:
        body = msgspec.convert({"name": "", **wish}, MergeBody)
        recipe = check_saved(body, RouterSettings(model_names=(model,)))
    except ApiError as error:
        raise CommandError(f"lory merge: {error.message}") from error
    flags = {"model": model, "adapters": str(adapters), "out": str(out)}
    told = [f"--{name}={value}" for name, value in flags.items()]
    recipe_json = msgspec.json.encode(recipe).decode()
    code = subprocess.run([*COMMAND, *told, f"--recipe={recipe_json}"]).returncode
    if code == 0:
        typer.echo(
            f"{out}: {_made_of(recipe)}; served from a server's adapters folder as {out.name!r}"
        )
    return code


def _made_of(recipe: Recipe) -> str:
    weighted = ", ".join(f"{one.weight:g} x {one.adapter_id}" for one in recipe.sources)
    return f"{weighted} by {recipe.method}"
