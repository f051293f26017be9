"""Single modules of a package that must not start as a whole: its kernels without its engine.

Its folders become packages that run nothing, and what its modules would import from the rest of it
are stand-ins. It must not know whose modules they are.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class ForeignPackage:
    """One package of a folder; ImportError if another of its name was imported before."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = root.resolve()
        self.name = name
        known = sys.modules.get(name)
        if known is not None and list(known.__path__) != [str(self._root / name)]:
            raise ImportError(f"{name} was imported before, from {list(known.__path__)}")
        self.folders([name])

    def folders(self, names: Iterable[str]) -> None:
        """Packages, parents first, whose own start is skipped."""
        for name in names:
            if name not in sys.modules:
                self._add(name, folder=self._root.joinpath(*name.split(".")))

    def stand_in(self, name: str, **attributes: Any) -> None:
        """A module of nothing but these; its parents must be there."""
        if name not in sys.modules:
            self._add(name, **attributes)

    def module(self, name: str) -> ModuleType:
        return import_module(name)

    def _add(self, name: str, *, folder: Path | None = None, **attributes: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=folder is not None)
        if folder is not None:
            module.__path__ = [str(folder)]
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def nothing(*_args: object, **_kwargs: object) -> None:
    """Stands in for what is called and need not act."""
