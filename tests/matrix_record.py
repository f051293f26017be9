"""Keeps what the SGMV matrix found: pieces from the tests, a summary, one JSON file.

Tests hand their pieces over as the property `sgmv_matrix`, from whichever process they run in. A
file that is there already keeps the pieces that did not run this time, so a matrix may be run in
parts. It must not know how a piece is made.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import record

from sgmv_matrix import PROPERTY, summary


class MatrixRecord:
    """The plugin behind --record-matrix."""

    def __init__(self, file: Path, arguments: Iterable[str]) -> None:
        self._file = file
        self._arguments = list(arguments)
        self._pieces: dict[str, dict[str, Any] | None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that failed takes its piece from the file."""
        for name, value in report.user_properties if report.when == "call" else ():
            if name == PROPERTY and isinstance(value, dict):
                piece = {"date": record.today(), **value}
                self._pieces[piece["piece"]] = piece if report.passed else None

    def pytest_sessionfinish(self) -> None:
        if not self._pieces:
            return
        before = record.read(self._file)["pieces"] if self._file.exists() else []
        merged = {piece["piece"]: piece for piece in before} | self._pieces
        pieces = [piece for _, piece in sorted(merged.items()) if piece is not None]
        head = record.facts("pytest", self._arguments)
        record.write(self._file, {**head, "summary": summary(pieces), "pieces": pieces})
