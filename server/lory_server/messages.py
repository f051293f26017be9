"""What the router and an engine say to each other: plain data, encoded with msgpack.

The router sends commands, an engine answers with a stream of events. What else of the engine the
router imports, tests/test_architecture.py lists. It must not know torch, HTTP, files or time.

Frames on a byte stream are a 4-byte big-endian length followed by one msgpack-encoded message.
"""

from typing import Literal

import msgspec

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 256 * 1024 * 1024

FETCHED = "@"
"""First in the names of adapters that the router fetched; what follows is their folder. No
caller's name begins so."""

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4"]
LogLevel = Literal["debug", "info", "warning", "error"]

FinishReason = Literal["length", "eos", "stop_token", "cancelled", "timeout", "error"]
CancelReason = Literal["cancelled", "timeout"]
OrderKind = Literal["find", "load", "unload", "pin", "unpin", "drop"]

# Why a request failed. The router maps each code to an HTTP status (lory_router.errors).
FailureCode = Literal[
    "adapter_not_found",  # no such adapter, or not readable by the caller
    "adapter_invalid",  # damaged, misshapen, unsupported, or made for another base
    "adapter_capacity",  # larger than the whole adapter pool, or than what pins leave of it
    "adapter_pinned",  # it is pinned, and what was asked would put it out
    "revision_not_found",  # the adapter is there, but not in that revision
    "manner_changed",  # the adapter wants to be asked in another way than the router thought
    "context_too_long",  # prompt + max_new_tokens exceed the context or the KV pool
    "bad_request",  # token ids out of range and the like, found by the engine
    "overloaded",  # the engine's queue is full
    "reader_too_slow",  # the caller read its tokens more slowly than they came
    "engine_died",  # the engine process ended while the request was in flight
    "internal",
]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of everything that crosses the process border."""


# -- commands: router -> engine -------------------------------------------------------------


class EngineOptions(Message, frozen=True):
    """How an engine is built. Sent first, once. Bytes of 0 mean "derive from the machine"."""

    model: str
    """Local folder or hub id of the base, in safetensors."""
    adapters_dir: str = ""
    """Folder whose sub-folders (one or two levels) are PEFT adapters; empty: base only."""
    fetched_dir: str = ""
    """Folder whose sub-folders the router has fetched; each is named FETCHED and its sub-folder.
    Empty: none are."""
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    quantize: Quantization = "none"
    double_quant: bool = False
    """Round NF4's block scales as double quantization does, for adapters trained on such a base.
    The scales stay in float32: it saves no memory."""
    max_model_len: int = 0
    """Longest prompt + answer in tokens; 0: the base's own limit, if the KV pool holds it."""
    max_batch_rows: int = 64
    """Most sequences in one step."""
    max_step_tokens: int = 512
    """Most tokens in one step: the budget that chunks prefill."""
    max_queued: int = 1024
    """Most requests waiting or running; one more is refused as overloaded."""
    block_size: int = 16
    """Tokens in one block of KV cache."""
    memory_bytes: int = 0
    """All device memory the engine may use."""
    kv_bytes: int = 0
    adapter_pool_bytes: int = 0
    """Device bytes for resident adapters."""
    full_weight_bytes: int = 0
    """Device bytes for adapters' own embeddings, heads and norms, beside the pool."""
    adapter_host_bytes: int = 0
    """Host bytes for adapters that are loaded but not resident."""
    max_resident_adapters: int = 0
    """Most adapters on the device at once, whatever their size; 0: as many as the pool holds."""
    reader_processes: int = 1
    """Processes that read adapters beside the step; 0 reads on the engine's own threads."""
    prefix_caching: bool = True
    cuda_graphs: bool = True
    """Capture decode steps and replay them; of no use to a CPU."""
    threads: int = 0
    """CPU threads of the step; 0: all cores but what the router needs."""
    allow_base_mismatch: bool = False
    """Serve adapters whose configuration names another base of equal shapes."""
    log_level: LogLevel = "info"

    @property
    def serves_adapters(self) -> bool:
        return bool(self.adapters_dir or self.fetched_dir)


class Sampling(Message, frozen=True):
    """How one sequence's tokens are chosen. Every field is validated by the router."""

    max_new_tokens: int
    seed: int
    """u64; the router always picks one, so that a result can be repeated."""
    temperature: float = 0.0
    """0 is greedy; other values sample."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    """Over prompt and answer (CTRL, arXiv 1909.05858)."""
    frequency_penalty: float = 0.0
    """Per occurrence in the answer so far."""
    presence_penalty: float = 0.0
    """Once for each token that stands in the answer so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_top_logprobs: int = 0
    """Alternatives reported beside each sampled token."""
    prompt_logprobs: bool = False
    """Report log-probabilities of the prompt's own tokens; bypasses prefix reuse."""


class Submit(Message, frozen=True):
    """Start one sequence. Answered by `Token` events and exactly one `Finished`."""

    request_id: int
    """The router's own number, unique for the life of the connection among requests and calls,
    which the engine counts together; never a caller's string."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    adapter_id: str = ""
    """Empty: the base. Of merges, what `recipes.merged_id` makes."""
    adapter_revision: str = ""
    """A revision or its beginning, on disk or still in memory; empty: the one on disk now."""
    manner: str = ""
    """Digest of the manner that this was made by; a revision with another one fails it."""
    charged_as: str = ""
    """What charges call the adapter; empty: `adapter_id`."""
    tenant: str = "default"


class Cancel(Message, frozen=True):
    """End a request now. A request that has already finished is not affected."""

    request_id: int
    reason: CancelReason = "cancelled"


class ListAdapters(Message, frozen=True):
    """Answered by `AdapterList` with the same `call_id`."""

    call_id: int


class AdapterOrder(Message, frozen=True):
    """What an operator wants with one adapter. Answered by `OrderDone` with the same `call_id`.

    find    read it, and tell what it is
    load    bring it to the device
    unload  let it go from device and host, once the last request that holds it has ended
    pin     load it, and keep it on device and host until `unpin`
    drop    unpin and unload all its revisions
    """

    call_id: int
    kind: OrderKind
    adapter_id: str
    revision: str = ""
    """As in `Submit`. A pin without one follows the adapter when it is replaced."""


Command = EngineOptions | Submit | Cancel | ListAdapters | AdapterOrder

# -- events: engine -> router ---------------------------------------------------------------


class EngineInfo(Message, frozen=True):
    """The base is loaded; requests may come."""

    model: str
    architecture: str
    device: str
    dtype: str
    quantize: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int
    max_batch_rows: int
    max_step_tokens: int
    pid: int
    memory_table: tuple[tuple[str, int], ...]
    """What the memory plan gave to whom, in bytes, in the order to print."""
    load_seconds: float
    protocol: int = PROTOCOL_VERSION


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    code: FailureCode
    message: str
    """For the caller: names the field or tensor, and the fix."""
    source: str = ""
    """Of a merge, the adapter to blame."""
    tokenizer: str = ""
    """Of `manner_changed`: digest of the tokenizer to ask by."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    generated_tokens: int
    """Tokens sampled and committed, the one that ended the sequence included."""
    cached_tokens: int
    """Prompt tokens whose KV was reused."""
    queue_seconds: float
    """From acceptance to the first step that computed a token of it."""
    load_seconds: float
    """The part of the queue spent waiting for the adapter."""
    engine_seconds: float
    """The charge: this request's share of the steps' wall time."""


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token, in order. The token that ends the sequence (EOS) is sent too."""

    request_id: int
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Most likely (token id, log-probability) pairs, best first, if asked for."""


class Resolution(msgspec.Struct, frozen=True, array_like=True):
    """Which revision a request holds; told before its first token."""

    request_id: int
    adapter_revision: str


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Sent once, before the first token. The first prompt token has no log-probability."""

    request_id: int
    logprobs: tuple[float, ...]
    """Of prompt tokens 1..n-1, given what stands before each."""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """Beside each, the most likely (token id, log-probability) pairs, if alternatives were asked
    for; else empty."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """The one terminal event of a request."""

    request_id: int
    reason: FinishReason
    usage: Usage
    adapter_revision: str = ""
    failure: Failure | None = None


class Charge(msgspec.Struct, frozen=True, array_like=True):
    """What one request carries of one step's wall time."""

    request_id: int
    tenant: str
    adapter_id: str
    seconds: float
    prompt_tokens: int
    generated_tokens: int


class AdapterMove(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter moved between tiers since the last report."""

    adapter_id: str
    kind: Literal["load", "evict", "fail"]
    tier: Literal["host", "device"]
    """Where it was loaded to or evicted from."""
    seconds: float
    num_bytes: int


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the loop did since the previous report, or that nothing ran."""

    step: int
    wall_seconds: float
    """Time since the previous report."""
    idle_seconds: float = 0.0
    """The part of `wall_seconds` in which nothing ran; charges sum to the rest."""
    num_rows: int
    num_prompt_tokens: int
    num_sampled: int
    num_running: int
    num_waiting: int
    blocks_used: int
    blocks_cached: int
    """Free blocks that still hold reusable KV."""
    blocks_total: int
    prefix_queries: int
    prefix_hits: int
    """Prompt tokens looked up and found, in this step."""
    preemptions: int
    adapters_disk: int
    adapters_host: int
    adapters_device: int
    adapter_host_bytes: int
    adapter_device_bytes: int
    pins_host: int = 0
    """Pinned revisions, all of which are on the host."""
    pins_device: int = 0
    charges: tuple[Charge, ...] = ()
    moves: tuple[AdapterMove, ...] = ()


class StepEvents(Message, frozen=True):
    """All that one turn of the engine's loop has to say. Also sent, empty, as a heartbeat."""

    report: StepReport
    resolved: tuple[Resolution, ...] = ()
    prompts: tuple[PromptLogprobs, ...] = ()
    tokens: tuple[Token, ...] = ()
    finished: tuple[Finished, ...] = ()


class Matched(msgspec.Struct, frozen=True, array_like=True):
    """The modules of one name, over all layers, that an adapter changes."""

    module: str
    """The last part of its name, such as `q_proj`."""
    count: int
    ranks: tuple[int, ...]
    """Those that occur, in order; 0: a bias alone."""


class RevisionEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A revision that is in memory."""

    revision: str
    tier: Literal["host", "device"]
    matched: tuple[Matched, ...]
    file_bytes: int
    """Of the weights file."""
    host_bytes: int
    device_bytes: int
    is_pinned: bool
    invocation_tokens: tuple[int, ...] = ()
    """Of an aLoRA: it acts from these on."""
    num_requests: int = 0
    """Waiting or running, under the adapter's name."""


class AdapterEntry(msgspec.Struct, frozen=True, kw_only=True):
    adapter_id: str
    tier: Literal["disk", "host", "device"]
    """Of its latest revision."""
    revision: str = ""
    """The latest one, known once it has been loaded."""
    revisions: tuple[RevisionEntry, ...] = ()
    """All that are in memory, oldest first."""
    num_requests: int = 0
    """Those that still look for its bytes included."""
    idle_seconds: float | None = None
    """Since it was last asked for; None: never."""
    refusal: str = ""
    """Why the last attempt to load it failed; empty after one that did not."""


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request is to ask for that does not say so itself; None: nothing."""

    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None


class TrainedOn(msgspec.Struct, frozen=True, kw_only=True):
    """Which base an adapter was trained on: digests of its parts (`lory_trainer.digests`), as far
    as they are told."""

    config: str = ""
    tokenizer: str = ""
    weights: str = ""
    chat_template: str = ""
    """SHA-256; of an adapter that was trained through it."""
    is_quantized: bool | None = None


class Manner(msgspec.Struct, frozen=True, kw_only=True):
    """How a revision of an adapter wants to be asked, as its trainer wrote it down."""

    digest: str = ""
    """Of all below; empty where there is nothing."""
    template: str = ""
    """The prompt, with `{field}`s in it; empty: callers send prompts as they are."""
    fields: tuple[str, ...] = ()
    is_chat: bool = False
    """It was trained through the base's chat template: a prompt is a user's message."""
    completion_prefix: str = ""
    """What its answers begin with, before what is asked of them."""
    defaults: Defaults = Defaults()
    stop: tuple[str, ...] = ()
    eos_token: str = ""
    """What it learned to end with."""
    base: TrainedOn | None = None
    tokenizer: str = ""
    """Digest of its own tokenizer (`adapters.tokenizer_files`); empty: the base's."""
    vocab_size: int = 0
    """Of its own embedding and head; 0: the base's."""


NO_MANNER = Manner()
"""Of the base, and of adapters whose trainers say nothing."""


class AdapterList(Message, frozen=True):
    call_id: int
    adapters: tuple[AdapterEntry, ...]


class OrderDone(Message, frozen=True):
    call_id: int
    entry: AdapterEntry | None
    """The adapter afterwards; None: it could not be done."""
    revision: str = ""
    """Which one it was done to."""
    manner: Manner | None = None
    """Of that revision; told by `find`."""
    failure: Failure | None = None


class Fatal(Message, frozen=True):
    """The engine cannot go on and ends; `message` names the cause and the fix."""

    message: str


Event = EngineInfo | StepEvents | AdapterList | OrderDone | Fatal
