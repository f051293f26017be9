"""The table of keys in docs/training.md, made from the options and their other names.

`python -m lory_trainer.config_page docs/training.md` writes it anew between its two marks. This
module must not know how a file is read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lory_trainer.config import TrainOptions
from lory_trainer.config_keys import AXOLOTL, KEYS, LUDWIG, OTHERS, Alias, Key, Noted, Only, Several
from lory_trainer.config_translate import LUDWIG_DEFAULTS, group_of

BEGIN = "<!-- keys: made by python -m lory_trainer.config_page docs/training.md -->"
END = "<!-- end of keys -->"


def page() -> str:
    """Both tables, as Markdown."""
    return "\n".join([BEGIN, *_own_table(), "", *_foreign_table(), END])


def replaced(text: str) -> str:
    """A document with the tables as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{page()}{after}"


def _own_table() -> Iterator[str]:
    yield "| key | default | also called | |"
    yield "|---|---|---|---|"
    for path, default, text in _options(TrainOptions):
        names = sorted(
            key.path for key in KEYS.values() if isinstance(key, Alias) and key.to == path
        )
        called = ", ".join(f"`{name}`" for name in names)
        yield f"| `{path}` | {default} | {called} | {_cell(text)} |"


def _options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        group = group_of(field.annotation)
        if group is not None:
            yield from _options(group, f"{prefix}{name}.")
            continue
        path = f"{prefix}{name}"
        default = _default(field.get_default(call_default_factory=True))
        if path in LUDWIG_DEFAULTS:
            default += f" (Ludwig's form: {LUDWIG_DEFAULTS[path]})"
        yield path, default, field.description or ""


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ("", [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _foreign_table() -> Iterator[str]:
    yield "| key of | key | here | |"
    yield "|---|---|---|---|"
    for keys in (LUDWIG, AXOLOTL, OTHERS):
        for key in keys:
            here, text = _meaning(key)
            yield f"| {key.origin} | `{key.path}` | {here} | {_cell(text)} |"


def _meaning(key: Key) -> tuple[str, str]:
    match key:
        case Alias(to=to, note=note):
            return f"alias of `{to}`", note
        case Several(note=note):
            return "read", note
        case Only(values=values, reason=reason):
            shown = ", ".join(f"`{_yaml(value)}`" for value in values)
            return f"only {shown}", f"otherwise refused: {reason}"
        case Noted(note=note):
            return "no effect, and says so", note


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(document: Annotated[Path, typer.Argument(help="Markdown file with the marks.")]) -> None:
    """Write the tables of keys anew."""
    document.write_text(replaced(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
