"""Turns device bytes into weights, adapter pool, KV blocks and workspace, before anything is built.

Pure arithmetic over the numbers it is given; it must not know torch or any device.
"""

from dataclasses import dataclass

GIB = 1 << 30
DEFAULT_ENDS = 4
"""Heads and embeddings that adapters may have resident together unless told otherwise."""


class MemoryPlanError(ValueError):
    """The parts do not fit; the message says which flag to change."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What the model and the options ask for, in bytes where not said otherwise."""

    device_bytes: int
    """All the engine may use, weights included."""
    weight_bytes: int
    workspace_bytes: int
    """Activations, logits and tables of the largest step."""
    block_bytes: int
    block_size: int
    """Tokens."""
    max_batch_rows: int
    max_model_len: int
    """Tokens; what the base allows, or what was asked for."""
    asked_model_len: int = 0
    """What was asked for, and is never lowered; 0: nothing."""
    adapter_pool_bytes: int = 0
    """0: a quarter of what weights and workspace leave, up to `adapter_pool_cap_bytes`."""
    adapter_pool_cap_bytes: int = 0
    """0: none."""
    full_weight_bytes: int = 0
    """Of adapters' own heads and embeddings. 0: DEFAULT_ENDS of the base's, up to an eighth of
    what all but the KV cache leave."""
    end_bytes: int = 0
    """Of one head or embedding."""
    kv_bytes: int = 0
    """0: the rest, as far as the largest batch can use it."""
    serves_adapters: bool = True
    graph_bytes: int = 0
    """Captured decode steps; 0: nothing is captured."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    weight_bytes: int
    workspace_bytes: int
    adapter_pool_bytes: int
    num_blocks: int
    block_bytes: int
    max_model_len: int
    """Tokens; lowered to what the KV pool holds."""
    unused_bytes: int
    graph_bytes: int = 0
    full_weight_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def table(self) -> tuple[tuple[str, int], ...]:
        graphs = (("CUDA graphs", self.graph_bytes),) if self.graph_bytes else ()
        return (
            ("weights", self.weight_bytes),
            ("workspace", self.workspace_bytes),
            *graphs,
            ("adapter pool", self.adapter_pool_bytes),
            ("full weights", self.full_weight_bytes),
            ("KV blocks", self.kv_bytes),
            ("unused", self.unused_bytes),
        )


def plan_memory(needs: MemoryNeeds) -> MemoryPlan:
    """Raises MemoryPlanError if the parts do not fit."""
    fixed = needs.weight_bytes + needs.workspace_bytes + needs.graph_bytes
    left = needs.device_bytes - fixed
    if left <= 0:
        graphs = f"; CUDA graphs {_mib(needs.graph_bytes)}" if needs.graph_bytes else ""
        raise MemoryPlanError(
            f"weights ({_mib(needs.weight_bytes)}) and workspace "
            f"({_mib(needs.workspace_bytes)}{graphs}) need more than the "
            f"{_mib(needs.device_bytes)} allowed; raise --memory, lower --max-step-tokens or "
            "use --quantize nf4"
        )
    pool = _adapter_pool(needs, left)
    full = _full_weights(needs, left - pool - needs.kv_bytes)
    if pool + full >= left:
        raise MemoryPlanError(
            f"--adapter-memory ({_mib(pool)}) and --full-weights-memory ({_mib(full)}) leave "
            f"nothing for the KV cache: weights and workspace leave {_mib(left)}; lower them or "
            "raise --memory"
        )
    num_blocks = _num_blocks(needs, left - pool - full)
    holds = num_blocks * needs.block_size
    if holds < needs.asked_model_len:
        raise MemoryPlanError(
            f"--max-model-len {needs.asked_model_len} needs more than the {holds} tokens that the "
            f"KV cache holds ({_mib(num_blocks * needs.block_bytes)}); lower it, or raise "
            "--kv-memory or --memory"
        )
    return MemoryPlan(
        weight_bytes=needs.weight_bytes,
        workspace_bytes=needs.workspace_bytes,
        adapter_pool_bytes=pool,
        num_blocks=num_blocks,
        block_bytes=needs.block_bytes,
        max_model_len=min(needs.max_model_len, holds),
        unused_bytes=left - pool - full - num_blocks * needs.block_bytes,
        graph_bytes=needs.graph_bytes,
        full_weight_bytes=full,
    )


def _adapter_pool(needs: MemoryNeeds, left: int) -> int:
    if not needs.serves_adapters:
        return 0
    pool = needs.adapter_pool_bytes
    if not pool:
        pool = min(left // 4, needs.adapter_pool_cap_bytes or left)
    if pool >= left:
        raise MemoryPlanError(
            f"--adapter-memory ({_mib(pool)}) leaves nothing for the KV cache: weights and "
            f"workspace leave {_mib(left)}; lower it or raise --memory"
        )
    return pool


def _full_weights(needs: MemoryNeeds, left: int) -> int:
    if not needs.serves_adapters:
        return 0
    return needs.full_weight_bytes or min(DEFAULT_ENDS * needs.end_bytes, max(left, 0) // 8)


def _num_blocks(needs: MemoryNeeds, left: int) -> int:
    if needs.kv_bytes > left:
        raise MemoryPlanError(
            f"--kv-memory ({_mib(needs.kv_bytes)}) is more than the {_mib(left)} that are left; "
            "lower it, lower --adapter-memory or raise --memory"
        )
    blocks_a_row = -(-needs.max_model_len // needs.block_size)
    useful = needs.max_batch_rows * blocks_a_row
    if needs.kv_bytes:
        num_blocks = needs.kv_bytes // needs.block_bytes
    else:
        num_blocks = min(left // needs.block_bytes, useful)
    if num_blocks < 2:
        raise MemoryPlanError(
            f"the KV cache needs at least two blocks of {_mib(needs.block_bytes)}, "
            f"{_mib(needs.kv_bytes or left)} are left; raise --kv-memory or --memory"
        )
    return num_blocks


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
