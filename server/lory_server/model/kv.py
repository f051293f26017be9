"""The paged store of keys and values: one pair of tensors a layer, cut in blocks.

It must not know which sequence owns a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lory_server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer, keys and values of [num_blocks, num_kv_heads, block_size, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @staticmethod
    def allocate(
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KVCache":
        """Zeroed, so that the padding a kernel reads past a sequence's end is finite."""
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)

        def layers() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)
            )

        return KVCache(layers(), layers())

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def block_size(self) -> int:
        return self.keys[0].shape[2]
