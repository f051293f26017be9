"""The files of an adapter, or of all the adapters that one is merged from, open side by side.

Both look alike to whoever loads them: a signature that changes when one of the files does. It must
not know what the files mean, or how adapters are merged.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass

import msgspec

from lory_server.adapters.errors import AdapterError, AdapterNotFoundError, blaming
from lory_server.adapters.store import AdapterFiles, AdapterStore, Closing, Signature
from lory_server.recipes import MERGED, Recipe, merged_id, read_recipe


@dataclass(frozen=True, slots=True)
class SourceFiles(Closing):
    """Use it in a `with` block."""

    recipe: Recipe
    sources: tuple[AdapterFiles, ...]
    """In the recipe's order."""

    def close(self) -> None:
        for files in self.sources:
            files.close()

    @property
    def manifest_fd(self) -> None:
        """What is merged of several is asked as text, if by one tokenizer."""
        return None

    @property
    def signature(self) -> Signature:
        """Of what is merged how, whatever it is called, and of all files."""
        nameless = msgspec.structs.replace(self.recipe, name="")
        digest = hashlib.sha256(merged_id(nameless).encode()).digest()
        fields = [field for files in self.sources for field in files.signature]
        return (int.from_bytes(digest[:16], "big"), *fields)

    def check_unchanged(self) -> None:
        for index, files in enumerate(self.sources):
            try:
                files.check_unchanged()
            except AdapterError as error:
                raise blaming(error, self.recipe, index) from error

    @property
    def is_settled(self) -> bool:
        return all(files.is_settled for files in self.sources)


Files = AdapterFiles | SourceFiles


def locate(store: AdapterStore, adapter_id: str) -> Files:
    """Raises as `store.locate`, and says which of several sources is to blame."""
    if not adapter_id.startswith(MERGED):
        return store.locate(adapter_id)
    try:
        recipe = read_recipe(adapter_id)
    except msgspec.MsgspecError:
        raise AdapterNotFoundError("no adapter is called so") from None
    with ExitStack() as opened:
        found: list[AdapterFiles] = []
        for index, source in enumerate(recipe.sources):
            try:
                files = store.locate(source.adapter_id)
            except AdapterError as error:
                raise blaming(error, recipe, index) from error
            found.append(files)
            opened.callback(files.close)
        opened.pop_all()
    return SourceFiles(recipe, tuple(found))
