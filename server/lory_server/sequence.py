"""One stream of tokens being generated, and the arithmetic of where it stands.

    tokens        [ prompt ................ | answer, committed ... ] + num_pending not seen yet
    num_computed  positions whose KV is written, or will be by steps already submitted
    activation    the first position that the adapter computes; the base computes those before it

Owned and changed by the scheduler alone. This module must not know tensors, time or adapters'
bytes.
"""

from dataclasses import dataclass, field

from lory_server.blocks import BlockHash, branch_hash, chain_hash, root_hash
from lory_server.messages import FinishReason, Sampling

NO_LANE = -1

BASE_WEIGHTS = "base"
"""What stands for a digest where the base alone computes."""


def activation_of(prompt: tuple[int, ...], invocation: tuple[int, ...]) -> int | None:
    """Where an adapter begins to act: where its invocation tokens last begin in the prompt, as in
    PEFT. Those of an answer do not count. None: it never acts."""
    if not invocation:
        return 0
    at = _as_text(prompt[::-1]).find(_as_text(invocation[::-1]))
    return None if at < 0 else len(prompt) - at - len(invocation)


def _as_text(token_ids: tuple[int, ...]) -> str:
    """A character a token: text is searched in linear time, whoever chose both."""
    return "".join(map(chr, token_ids))


@dataclass(slots=True, eq=False)
class Sequence:
    request_id: int
    sampling: Sampling
    tokens: list[int]
    tenant: str
    weights: str
    """Digest of what computes its KV: the adapter's revision, or the base's own."""
    activation: int = 0
    """Position from which they do; the base computes those before it."""
    revision: str = ""
    """Adapter revision that acts on it; empty: none does."""
    adapter_id: str = ""
    adapter_bytes: int = 0
    full_bytes: int = 0
    """Of the adapter's weights in place of the base's, beside `adapter_bytes`."""
    has_own_head: bool = False
    """Its logits take a product with a head of the adapter's own."""
    short_tokens: int = 0
    """Most tokens that it can have with the first of two sets of rotations; 0: there is one."""
    is_long: bool = False
    """All that it computes takes the second."""
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
    def outgrows(self) -> bool:
        """Whether what it computes next, and so all before it, needs the second rotations."""
        return not self.is_long and 0 < self.short_tokens < self.num_computed + self.num_wanted

    @property
    def rope_offset(self) -> int:
        return self.short_tokens if self.is_long else 0

    def lengthen(self) -> None:
        """From here on it takes the second rotations, and shares no KV with those that do not."""
        self.is_long = True
        self._hashes.clear()

    def runs(self, num_tokens: int) -> list[int]:
        """The next tokens to compute as runs that the base computes, or the adapter, not both."""
        before = min(max(self.activation - self.num_computed, 0), num_tokens)
        return [run for run in (before, num_tokens - before) if run]

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
            block = self.tokens[done * block_size : (done + 1) * block_size]
            self._hashes.append(chain_hash(self._parent_hash(done, block_size), block))
        return self._hashes[:count]

    def _parent_hash(self, index: int, block_size: int) -> BlockHash:
        """What block `index` follows. Those before the activation are shared with the base."""
        first = BASE_WEIGHTS if self.activation else self.weights
        parent = self._hashes[-1] if index else root_hash(self.tenant, first, self.is_long)
        if self.activation and index == self.activation // block_size:
            return branch_hash(parent, self.weights, self.activation)
        return parent
