"""What is told of an adapter: modules by the last part of their names, ranks, the file's size.

In: a manifest. Out: plain data for lists. It must not know tiers, files or the base.
"""

from dataclasses import dataclass

from lory_server.adapters.format import AdapterManifest
from lory_server.messages import Matched


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one revision; kept as long as it is in memory."""

    matched: tuple[Matched, ...]
    file_bytes: int
    """Of the weights file."""

    @classmethod
    def of(cls, manifest: AdapterManifest) -> "Facts":
        return cls(matched_by(manifest), manifest.file_bytes)


def matched_by(manifest: AdapterManifest) -> tuple[Matched, ...]:
    """In the order of the first module of each name."""
    counts: dict[str, int] = {}
    ranks: dict[str, set[int]] = {}
    for part in manifest.slices:
        name = _last_part(part.a.name)
        counts[name] = counts.get(name, 0) + 1
        ranks.setdefault(name, set()).add(part.rank)
    return tuple(Matched(name, count, tuple(sorted(ranks[name]))) for name, count in counts.items())


def _last_part(tensor_name: str) -> str:
    """`q_proj` of `...self_attn.q_proj.lora_A.weight`."""
    return tensor_name.partition(".lora_")[0].rpartition(".")[2]
