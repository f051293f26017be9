"""What the front may do and how much of it: one frozen value, built by the command line.

It must not know where a setting comes from (flags, files, environment).
"""

from dataclasses import dataclass

from lory_router.sources.reference import SourceKind


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Limits and names of the HTTP front. Every field has a safe default but the names."""

    model_names: tuple[str, ...]
    """Names the base answers to; the first is the one in replies."""
    adapters_dir: str = ""
    """The adapters folder, as it was given; only adapters' tokenizers are read from it here."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer keys; empty: no authentication."""
    strict_base: bool = False
    """Refuse adapters that were trained on another base, as their manifests tell."""
    adapter_sources: frozenset[SourceKind] = frozenset()
    """Where adapters may come from beside the local folder."""
    trusted_templates: frozenset[SourceKind] = frozenset(("s3", "web"))
    """Sources beside the local folder whose adapters' chat templates are run; of these two an
    operator lists what may be named."""
    max_concurrent_requests: int = 256
    """Most generation requests in flight; one more is refused with 429."""
    max_input_length: int = 0
    """Longest prompt in tokens; 0: the engine's context less one."""
    default_max_new_tokens: int = 0
    """Answer length when a caller names none; 0: up to the end of the context."""
    max_best_of: int = 4
    """Most sequences for one prompt (best_of, n)."""
    max_prompts: int = 64
    """Most prompts in one completions request."""
    max_sequences: int = 128
    """Most sequences of one request: prompts times best_of."""
    max_tenant_merges: int = 64
    """Most different merges that requests of one tenant ask for in a minute; more are refused with
    429."""
    max_stop_sequences: int = 16
    """Most stop strings of one request."""
    max_stop_chars: int = 256
    """Longest stop string."""
    max_top_logprobs: int = 20
    """Most alternatives reported for a token."""
    max_logit_bias: int = 1024
    """Most tokens with a bias."""
    max_body_bytes: int = 2 * 1024 * 1024
    """Largest request body; more is refused with 413."""
    max_tokenize_bytes: int = 128 * 1024
    """Longest text for /tokenize, whose reply is some fifty times as long; more is refused."""
    max_held_body_bytes: int = 256 * 1024 * 1024
    """Most bytes of all bodies together, of each those beyond the first 64 KiB."""
    body_timeout_s: float = 30.0
    """Longest wait for the whole body of a request; more is refused with 408."""
    request_timeout_s: float = 600.0
    """Deadline of a generation request, queueing included; it then ends with a timeout."""
    first_token_header_wait_s: float = 5.0
    """How long a stream's headers wait for the first token, so that early failures keep status."""
    keepalive_s: float = 15.0
    """Silence after which a stream carries a comment line."""
    stream_buffer_tokens: int = 65536
    """Most tokens of one request, alternatives counted, held for a reader slower than the engine;
    more ends it."""
    retry_after_s: int = 2
    """What a caller who was refused for load is told to wait."""
    offload_chars: int = 4096
    """Texts longer than this are tokenised off the event loop."""

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise ValueError("model_names: give at least one non-empty name for the base")
        if any(not key for key in self.api_keys):
            raise ValueError("api_keys: a key is empty; leave the option out to serve openly")
        if not 1 <= self.retry_after_s <= 120:
            raise ValueError("retry_after_s: must be between 1 and 120")
