"""One stream of tokens being generated, and the arithmetic of where it stands.

    tokens        [ prompt ................ | answer, committed ... ] + num_pending not seen yet
    num_computed  positions whose KV is written, or will be by steps already submitted

Owned and changed by the scheduler alone. This module must not know tensors, time or adapters'
bytes.
"""

from dataclasses import dataclass, field

from lory_server.blocks import BlockHash, chain_hash, root_hash
from lory_server.messages import FinishReason, Sampling

NO_LANE = -1


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: int
    sampling: Sampling
    tokens: list[int]
    tenant: str
    weights: str
    """Digest of what computes its KV: the adapter's revision, or the base's own."""
    revision: str = ""
    """Adapter revision it holds; empty: the base."""
    adapter_id: str = ""
    adapter_bytes: int = 0
    full_bytes: int = 0
    """Of the adapter's weights in place of the base's, beside `adapter_bytes`."""
    has_own_head: bool = False
    """Its logits take a product with a head of the adapter's own."""
    prompt_len: int = field(init=False)
    num_computed: int = 0
    num_committed: int = 0
    """Positions computed by steps that have been committed."""
    num_pending: int = 0
    num_scored: int = 0
    """Positions whose successor in the prompt has been scored."""
    num_cached: int = 0
    """Prompt tokens whose KV was reused at first admission."""
    blocks: list[int] = field(default_factory=list)
    lane: int = NO_LANE
    epoch: int = 0
    """Counts admissions, so that rows of an earlier life are recognised and dropped."""
    overtaken: int = 0
    """How many later sequences were admitted while this one waited for its adapter."""
    num_preempted: int = 0
    started: bool = False
    finish_reason: FinishReason | None = None
    _hashes: list[BlockHash] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def num_total(self) -> int:
        """Tokens that exist, those sampled but not seen yet included."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_wanted(self) -> int:
        """Tokens that the next step could compute for this sequence."""
        last_computed = self.prompt_len + max(self.sampling.max_new_tokens - 1, 0)
        return min(self.num_total, last_computed) - self.num_computed

    @property
    def samples_after(self) -> bool:
        """Whether a row that reaches `num_total` samples (not when only the prompt is scored)."""
        return self.sampling.max_new_tokens > 0

    @property
    def needs_history(self) -> bool:
        sampling = self.sampling
        return (
            sampling.repetition_penalty != 1.0
            or sampling.frequency_penalty != 0.0
            or sampling.presence_penalty != 0.0
        )

    def full_block_hashes(self, block_size: int, num_tokens: int) -> list[BlockHash]:
        """Hashes of the blocks that lie wholly within the first `num_tokens` known tokens."""
        count = min(num_tokens, len(self.tokens)) // block_size
        while len(self._hashes) < count:
            done = len(self._hashes)
            parent = self._hashes[-1] if done else root_hash(self.tenant, self.weights)
            block = self.tokens[done * block_size : (done + 1) * block_size]
            self._hashes.append(chain_hash(parent, block))
        return self._hashes[:count]
