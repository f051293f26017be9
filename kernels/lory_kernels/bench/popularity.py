"""Which rows of a step use which adapter: by popularity, each with its formula.

Plain integers. It must not know tensors. Segments stand in the order of their slots, base first, as
the engine packs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lory_kernels.contract import BASE_SLOT

ZIPF_EXPONENT = 1.5
ZIPF_ADAPTERS = 32


@dataclass(frozen=True, slots=True)
class Mix:
    """Segment g has counts[g] rows and uses slots[g]."""

    counts: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def used_slots(self) -> tuple[int, ...]:
        return tuple(slot for slot in self.slots if slot != BASE_SLOT)

    @property
    def adapted_rows(self) -> int:
        pairs = zip(self.counts, self.slots, strict=True)
        return sum(count for count, slot in pairs if slot != BASE_SLOT)

    @property
    def slot_of_row(self) -> tuple[int, ...]:
        pairs = zip(self.counts, self.slots, strict=True)
        return tuple(slot for count, slot in pairs for _ in range(count))


@dataclass(frozen=True, slots=True)
class Popularity:
    """A way to deal rows to adapters."""

    name: str
    formula: str
    mix: Callable[[int], Mix]


def by_name(name: str) -> Popularity:
    """One of POPULARITIES, or `equal-N`; ValueError if it is neither."""
    if name in POPULARITIES:
        return POPULARITIES[name]
    kind, _, count = name.partition("-")
    if kind == "equal" and count.isdecimal() and int(count):
        return equal(int(count))
    known = ", ".join([*POPULARITIES, "equal-N"])
    raise ValueError(f"popularity: {name!r} is not one of {known}")


def equal(count: int) -> Popularity:
    return Popularity(
        f"equal-{count}",
        f"{count} adapters, rows dealt in equal shares; as many adapters as rows at most",
        lambda rows: _adapters(_deal(rows, [1.0] * count)),
    )


def _adapters(counts: Sequence[int], base_rows: int = 0) -> Mix:
    """An adapter for each count that is not 0, after the base's rows if there are any."""
    kept = [count for count in counts if count]
    slots = list(range(len(kept)))
    if base_rows:
        kept, slots = [base_rows, *kept], [BASE_SLOT, *slots]
    return Mix(tuple(kept), tuple(slots))


def _deal(rows: int, shares: Sequence[float]) -> list[int]:
    """Whole rows in proportion to the shares; what is left goes to the largest remainders."""
    exact = [rows * share / sum(shares) for share in shares]
    counts = [int(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: rows - sum(counts)]:
        counts[i] += 1
    return counts


def _uniform(rows: int) -> Mix:
    groups = next(n for n in range(1, rows + 1) if n * n >= rows)
    return _adapters(_deal(rows, [1.0] * groups))


def _zipf(rows: int) -> Mix:
    places = range(1, min(rows, ZIPF_ADAPTERS) + 1)
    return _adapters(_deal(rows, [place**-ZIPF_EXPONENT for place in places]))


POPULARITIES = {
    one.name: one
    for one in (
        Popularity("distinct", "row k uses adapter k", lambda rows: _adapters([1] * rows)),
        Popularity("identical", "every row uses one adapter", lambda rows: _adapters([rows])),
        Popularity("uniform", "ceil(sqrt(rows)) adapters, rows in equal shares", _uniform),
        Popularity(
            f"zipf-{ZIPF_EXPONENT}",
            f"rows of adapter k in proportion to k^-{ZIPF_EXPONENT}, k = 1..min(rows, "
            f"{ZIPF_ADAPTERS}); an adapter whose share rounds to no row is absent",
            _zipf,
        ),
        Popularity(
            "base-only", "no row uses an adapter", lambda rows: _adapters([], base_rows=rows)
        ),
        Popularity(
            "half-base",
            "half of the rows use no adapter, each other row one of its own",
            lambda rows: _adapters([1] * (rows - rows // 2), base_rows=rows // 2),
        ),
    )
}
