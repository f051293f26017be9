"""Folders that are there whole or not at all: built aside, synced to disk, renamed.

It must not know what is written in them.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`; what is left of it goes away at the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, output: Path) -> None:
    """Renames the draft into place; a replaced folder is gone for the time of one rename."""
    _let_others_read(draft)
    _sync(draft)
    old = draft.with_name(f"{draft.name}.old")
    if output.exists():
        output.rename(old)
    try:
        draft.rename(output)
    finally:
        if old.exists() and not output.exists():
            old.rename(output)
    _sync_path(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """At once under its own name, then file by file."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """What a killed process left of drafts of `folder`, or of what it was about to remove."""
    if folder.parent.is_dir():
        for path in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(path, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Temporary folders and safetensors files are their owner's alone; servers run as others."""
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)


def _sync(folder: Path) -> None:
    """Files first, then the folder's own entry list."""
    for path in (*folder.iterdir(), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
