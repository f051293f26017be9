"""What a load test asks for: which adapters, how often each, which prompts, and when.

Pure data from a seed: the same workload and repetition always give the same requests, and no two
repetitions share a prompt, so that no run finds the KV of the one before it. It must not know HTTP,
clocks or figures.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

PopularityKind = Literal["identical", "uniform", "zipf", "distinct"]

FIRST_TOKEN_ID = 3
"""Ids below it are left to special tokens."""

_FORMULAS: dict[PopularityKind, str] = {
    "identical": "every request uses adapter 1 of {n}",
    "uniform": "drawn: p_i = 1 / {n}",
    "zipf": "drawn: p_i = i^-{alpha:g} / sum_j j^-{alpha:g}, i and j from 1 to {n}",
    "distinct": "request k uses adapter k modulo {n}: round robin",
}


class WorkloadError(ValueError):
    """The workload makes no sense; the message names the option."""


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often each of n adapters is asked for."""

    kind: PopularityKind
    alpha: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """identical, uniform, distinct or zipf:ALPHA."""
        kind, separator, alpha = text.partition(":")
        if kind == "zipf" and separator:
            return cls("zipf", _positive_number("--popularity zipf:ALPHA", alpha))
        if kind in ("identical", "uniform", "distinct") and not separator:
            return cls(kind)
        raise WorkloadError(
            f"--popularity {text!r}: choose identical, uniform, distinct or zipf:ALPHA (zipf:1.1)"
        )

    def formula(self, num_adapters: int) -> str:
        return _FORMULAS[self.kind].format(n=num_adapters, alpha=self.alpha)

    def choose(self, num_adapters: int, num_requests: int, draw: random.Random) -> list[int]:
        """The adapter of each request, as a number below `num_adapters`."""
        if self.kind == "identical":
            return [0] * num_requests
        if self.kind == "distinct":
            return [request % num_adapters for request in range(num_requests)]
        weights = [(place + 1) ** -self.alpha for place in range(num_adapters)]
        return draw.choices(range(num_adapters), weights, k=num_requests)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make."""

    adapter: str
    """Empty: the base."""
    prompt: Sequence[int] | str
    at_s: float
    """When to send it in an open loop, from the start; 0 in a closed one."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Every request of every repetition."""

    num_requests: int
    adapters: tuple[str, ...]
    popularity: Popularity
    base_share: float
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int
    texts: tuple[str, ...] = ()
    """Prompts to send in turn instead of random token ids."""
    rate_per_s: float = 0.0
    """Mean arrivals a second of an open loop; 0: a closed loop."""

    def __post_init__(self) -> None:
        if not 0 <= self.base_share <= 1:
            raise WorkloadError(f"--base-share {self.base_share}: a share is from 0 to 1")
        if not self.texts and self.vocab_size <= FIRST_TOKEN_ID:
            raise WorkloadError(
                f"--vocab-size {self.vocab_size}: random token ids need more than {FIRST_TOKEN_ID}"
            )

    @property
    def num_base_requests(self) -> int:
        if not self.adapters:
            return self.num_requests
        return round(self.base_share * self.num_requests)

    def requests(self, repetition: int) -> list[Ask]:
        """What repetition number `repetition` sends, in the order of sending."""
        draw = random.Random(f"{self.seed}/{repetition}")
        names = self._names(draw)
        times = self._arrivals(draw) if self.rate_per_s else iter([0.0] * len(names))
        return [
            Ask(name, self._prompt(place, repetition, draw), at_s)
            for place, (name, at_s) in enumerate(zip(names, times, strict=False))
        ]

    def described(self) -> dict[str, object]:
        """For the record: every number, and the formulas of what is drawn."""
        arrivals = "closed loop"
        if self.rate_per_s:
            arrivals = f"open loop, Poisson: gaps drawn from Exp({self.rate_per_s:g} per second)"
        prompts = f"random token ids in [{FIRST_TOKEN_ID}, {self.vocab_size}), new ones each run"
        return {
            "requests": self.num_requests,
            "base_requests": self.num_base_requests,
            "adapters": len(self.adapters),
            "popularity": self.popularity.kind if self.adapters else "base alone",
            "popularity_formula": self.popularity.formula(len(self.adapters)),
            "base_rows": "a fixed number of requests, at places drawn without replacement",
            "arrivals": arrivals,
            "prompts": f"{len(self.texts)} given texts in turn" if self.texts else prompts,
            "prompt_tokens": None if self.texts else self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "seed": self.seed,
        }

    def _names(self, draw: random.Random) -> list[str]:
        num_adapted = self.num_requests - self.num_base_requests
        chosen = self.popularity.choose(len(self.adapters), num_adapted, draw)
        adapted = iter([self.adapters[number] for number in chosen])
        base_places = set(draw.sample(range(self.num_requests), self.num_base_requests))
        return ["" if place in base_places else next(adapted) for place in range(self.num_requests)]

    def _arrivals(self, draw: random.Random) -> Iterator[float]:
        at_s = 0.0
        while True:
            yield at_s
            at_s += draw.expovariate(self.rate_per_s)

    def _prompt(self, place: int, repetition: int, draw: random.Random) -> list[int] | str:
        if self.texts:
            return self.texts[(repetition * self.num_requests + place) % len(self.texts)]
        return draw.choices(range(FIRST_TOKEN_ID, self.vocab_size), k=self.prompt_tokens)


def adapter_names(wanted: str, pattern: str, served: Sequence[str]) -> tuple[str, ...]:
    """`wanted`: 'all' that are served, a number of names made by `pattern`, or names."""
    if wanted == "all":
        return tuple(served)
    if wanted.isdecimal():
        return tuple(_fill(pattern, number) for number in range(int(wanted)))
    return tuple(name.strip() for name in wanted.split(",") if name.strip())


def _fill(pattern: str, number: int) -> str:
    try:
        return pattern.format(i=number)
    except (LookupError, ValueError) as error:
        raise WorkloadError(
            f"--adapter-pattern {pattern!r}: write the number as {{i}} or {{i:02d}}"
        ) from error


def _positive_number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise WorkloadError(f"{option}: {text!r} is not a number above 0")
    return number
