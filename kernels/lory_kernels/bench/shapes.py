"""The shapes that ops are measured at: those of whole models, by name.

It must not know what is measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A packed linear; the widths of its slices stand side by side."""

    name: str
    in_features: int
    slices: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.slices)

    @property
    def out_offsets(self) -> tuple[int, ...]:
        return tuple(sum(self.slices[:k]) for k in range(len(self.slices)))

    @property
    def label(self) -> str:
        return f"{self.name} {self.in_features}->{self.out_features}"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, in numbers."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def sites(self) -> tuple[LinearShape, ...]:
        """Where adapters attach."""
        kv = self.kv_width
        return (
            LinearShape("qkv", self.hidden, (self.hidden, kv, kv)),
            LinearShape("o", self.hidden, (self.hidden,)),
            LinearShape("gate_up", self.hidden, (self.inner, self.inner)),
            LinearShape("down", self.inner, (self.hidden,)),
        )

    @property
    def head(self) -> LinearShape:
        return LinearShape("head", self.hidden, (self.vocabulary,))


MODELS = {
    model.name: model
    for model in (
        ModelShape("tiny", 128, 4, 2, 256, 512),
        ModelShape("small", 512, 8, 4, 1408, 4096),
        ModelShape("tinyllama", 2048, 32, 4, 5632, 32000),
        ModelShape("8b", 4096, 32, 8, 14336, 128256),
    )
}
