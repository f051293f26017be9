"""Writes the table of PEFT's features into docs/adapters.md, between its marks.

    python tests/parity_table.py            write it
    python tests/parity_table.py --check    say whether it is as it should be

It must not know how a feature is proved.
"""

import re
import sys
from pathlib import Path

from parity_matrix import ROWS, Row

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"
_TABLE = re.compile(r"(?<=<!-- table:parity -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def table() -> str:
    lines = ["| of PEFT | fields | | tests, or what is said |", "|---|---|---|---|"]
    return "\n".join([*lines, *map(_line, ROWS)]) + "\n"


def _line(row: Row) -> str:
    fields = ", ".join(f"`{name}`" for name in row.fields)
    return f"| {row.feature} | {fields} | {_outcome(row)} | {_reason(row)} |"


def _outcome(row: Row) -> str:
    over_nf4 = any(proof.test.endswith("::test_nf4") for proof in row.proofs)
    return f"{row.outcome}, over NF4 too" if over_nf4 else row.outcome


def _reason(row: Row) -> str:
    if row.outcome == "refused":
        return f'"{row.says}"'
    return ", ".join(dict.fromkeys(f"`{proof.test.split('::')[0]}`" for proof in row.proofs))


def fill(text: str) -> str:
    filled, count = _TABLE.subn(lambda _: table(), text)
    if count != 1:
        raise ValueError(f"{PAGE.name} has {count} tables of parity")
    return filled


def main() -> int:
    text = PAGE.read_text()
    filled = fill(text)
    if "--check" in sys.argv[1:]:
        return int(filled != text)
    PAGE.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
