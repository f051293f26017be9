"""What `lory serve` can be told: one frozen value, its flags and its environment variables.

Every field is a flag (`--max-batch-rows`) and a variable (`LORY_MAX_BATCH_ROWS`). This is the only
module that reads the environment. It must not know HTTP, processes or how a setting is used.
"""

# ruff: noqa: RUF009 - flag() is dataclasses.field() by another name

import difflib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import typer

from lory_router.flags import flag, size_flag
from lory_router.key_config import KeyConfig
from lory_router.settings import RouterSettings
from lory_router.source_config import SourceConfig
from lory_router.sources.settings import SourceSettings
from lory_router.tuning.settings import TuningSettings
from lory_router.tuning_config import TuningConfig
from lory_router.values import comma_list, is_switch, parse_number, parse_whole
from lory_server.messages import DeviceName, DtypeName, EngineOptions, LogLevel, Quantization

ENVIRONMENT_PREFIX = "LORY_"


class CommandError(Exception):
    """A command cannot do what it was asked; the message is one line with the fix."""

    exit_code = 1


class ConfigError(CommandError):
    """A setting is wrong; the message names it."""

    exit_code = 2


class StartError(CommandError):
    """The settings are well, but the server cannot start with them."""


@dataclass(frozen=True)
class ModelConfig:
    """The base and its adapters."""

    model: str = flag("", "Local folder or hub id of the base, in safetensors. Required.")
    adapters: str = flag("", "Folder whose sub-folders are PEFT adapters; empty: base only.")
    registry: str = flag(
        "", "SQLite file of aliases, pins and removed adapters; empty: in memory, until the end."
    )
    warm_up: str = flag("", "Adapters loaded before /health is 200, comma-separated.")
    device: DeviceName = flag("auto", "Where the engine runs; auto takes a GPU if there is one.")
    dtype: DtypeName = flag("auto", "Number format of weights and activations.")
    quantize: Quantization = flag("none", "Quantize the base's linears as it loads.")
    double_quant: bool = flag(
        False, "Round NF4's block scales as double quantization does; saves no memory."
    )
    max_model_len: int = flag(
        0, "Longest prompt + answer in tokens; 0: what the base and the KV pool allow.", at_least=0
    )
    allow_base_mismatch: bool = flag(
        False, "Serve adapters that name another base of equal shapes."
    )
    strict_base: bool = flag(
        False, "Refuse adapters whose manifest says that they were trained on another base."
    )
    served_model_name: str = flag(
        "", "Names the base answers to, comma-separated; empty: the model's own name."
    )


@dataclass(frozen=True)
class StepConfig:
    """How much one step and its queue hold."""

    max_batch_rows: int = flag(64, "Most sequences in one step.", at_least=1)
    max_step_tokens: int = flag(512, "Most tokens in one step; long prompts are cut.", at_least=1)
    max_queued: int = flag(
        1024, "Most requests waiting or running; one more is refused with 429.", at_least=1
    )
    block_size: int = flag(16, "Tokens in one block of KV cache.", at_least=1, at_most=1024)
    prefix_caching: bool = flag(True, "Reuse the KV of prompts that begin alike.")
    cuda_graphs: bool = flag(True, "Capture decode steps on a GPU at start, and replay them.")
    threads: int = flag(0, "CPU threads of the step; 0: as many as pay.", at_least=0)
    step_timeout: float = flag(
        30.0, "Seconds without a step or a heartbeat after which the engine is killed.", at_least=0
    )


@dataclass(frozen=True)
class MemoryConfig:
    """Who gets which bytes. Sizes are written 512MiB or 4GB; 0 means derived from the machine."""

    memory: int = size_flag(0, "All device memory the engine may use; 0: derived.")
    kv_memory: int = size_flag(0, "Device memory of the KV cache; 0: derived.")
    adapter_memory: int = size_flag(0, "Device memory of resident adapters; 0: derived.")
    full_weights_memory: int = size_flag(0, "Device memory of adapters' own heads; 0: derived.")
    adapter_host_memory: int = size_flag(0, "Host memory of all loaded adapters; 0: derived.")
    max_resident_adapters: int = flag(
        0, "Most adapters on the device at once; 0: as many as its memory holds.", at_least=0
    )
    reader_processes: int = flag(
        1,
        "Processes that read adapters; 0: the engine's own threads do, and slow its steps.",
        at_least=0,
        at_most=16,
    )


@dataclass(frozen=True)
class HttpConfig:
    """The door."""

    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 is every network.")
    port: int = flag(8080, "Port to listen on; 0 picks a free one.", at_least=0, at_most=65535)
    max_connections: int = flag(
        2048, "Most open connections, as far as open files allow; one more gets a 503.", at_least=1
    )
    request_timeout: float = flag(600.0, "Seconds a request may take, queue included.", at_least=0)
    drain_timeout: float = flag(
        30.0, "Seconds running requests may take to finish at shutdown.", at_least=0
    )
    log_level: LogLevel = flag("info", "How much to log.")


@dataclass(frozen=True)
class LimitConfig:
    """The most that one request may ask for, or a tenant's together."""

    max_input_length: int = flag(
        0, "Longest prompt in tokens; 0: the context less one.", at_least=0
    )
    max_body_bytes: int = size_flag(2 * 1024 * 1024, "Largest request body.")
    max_best_of: int = flag(4, "Most sequences for one prompt (best_of, n).", at_least=1)
    max_tenant_merges: int = flag(
        64, "Most different merges (merged_adapters) of one tenant's requests a minute.", at_least=1
    )
    max_stop_sequences: int = flag(16, "Most stop strings of one request.", at_least=0)


@dataclass(frozen=True)
class MetricsConfig:
    """What is counted."""

    price_per_hour: float = flag(
        0.0,
        "What the machine costs in an hour, in any currency; 0: /metrics tells no costs.",
        at_least=0,
    )
    metrics_adapter_labels: int = flag(
        200,
        "Most adapters with figures of their own in /metrics; the rest are 'other'.",
        at_least=1,
    )


@dataclass(frozen=True)
class ServeConfig:
    """All of it, checked."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sources: SourceConfig = field(default_factory=SourceConfig)
    step: StepConfig = field(default_factory=StepConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    keys: KeyConfig = field(default_factory=KeyConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def __post_init__(self) -> None:
        for section, item in _leaves():
            _check_bounds(item, getattr(getattr(self, section.name), item.name))
        for check in (
            _check_model,
            _check_parts,
            _check_positive,
            _check_steps,
            _check_memory,
        ):
            check(self)

    @classmethod
    def from_flags(cls, values: Mapping[str, Any]) -> "ServeConfig":
        """The configuration these flag values (by field name) describe."""
        groups: dict[str, dict[str, Any]] = {section.name: {} for section in fields(cls)}
        sections = {item.name: section for section, item in _leaves()}
        for name, value in values.items():
            groups[sections[name].name][name] = value
        return cls(**{name: _section_type(name)(**group) for name, group in groups.items()})

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the base is called: the names given, or the model's, without a folder's path."""
        given = comma_list(self.model.served_model_name)
        local = Path(self.model.model)
        return given or ((local.resolve().name,) if local.is_dir() else (self.model.model,))

    @property
    def source_settings(self) -> SourceSettings | None:
        """Where adapters are fetched from; None: nowhere."""
        return self.sources.settings(self.http.request_timeout, self.step.max_queued)

    @property
    def tuning_settings(self) -> TuningSettings | None:
        """How adapters are trained beside; None: not at all."""
        model = self.model
        return self.tuning.settings(
            model.model,
            self.model_names,
            model.adapters,
            model.quantize,
            double_quant=model.double_quant,
        )

    def engine_options(self) -> EngineOptions:
        """The part the engine is built from."""
        return EngineOptions(
            model=self.model.model,
            adapters_dir=self.model.adapters,
            fetched_dir=str(self.source_settings.held) if self.source_settings else "",
            device=self.model.device,
            dtype=self.model.dtype,
            quantize=self.model.quantize,
            double_quant=self.model.double_quant,
            max_model_len=self.model.max_model_len,
            max_batch_rows=self.step.max_batch_rows,
            max_step_tokens=self.step.max_step_tokens,
            max_queued=self.step.max_queued,
            block_size=self.step.block_size,
            memory_bytes=self.memory.memory,
            kv_bytes=self.memory.kv_memory,
            adapter_pool_bytes=self.memory.adapter_memory,
            full_weight_bytes=self.memory.full_weights_memory,
            adapter_host_bytes=self.memory.adapter_host_memory,
            max_resident_adapters=self.memory.max_resident_adapters,
            reader_processes=self.memory.reader_processes,
            prefix_caching=self.step.prefix_caching,
            cuda_graphs=self.step.cuda_graphs,
            threads=self.step.threads,
            allow_base_mismatch=self.model.allow_base_mismatch,
            log_level=self.http.log_level,
        )

    def router_settings(self) -> RouterSettings:
        """The part the front is built from."""
        sources = self.source_settings
        return RouterSettings(
            model_names=self.model_names,
            adapters_dir=self.model.adapters,
            strict_base=self.model.strict_base,
            adapter_sources=sources.kinds if sources else frozenset(),
            trusted_templates=self.sources.trusted,
            api_keys=comma_list(self.keys.api_key),
            max_concurrent_requests=self.step.max_queued,
            max_input_length=self.limits.max_input_length,
            max_best_of=self.limits.max_best_of,
            max_tenant_merges=self.limits.max_tenant_merges,
            max_stop_sequences=self.limits.max_stop_sequences,
            max_body_bytes=self.limits.max_body_bytes,
            request_timeout_s=self.http.request_timeout,
        )


# -- flags and variables --------------------------------------------------------------------


def serve_parameters() -> list[inspect.Parameter]:
    """The signature of `lory serve`: one keyword for each field, as typer reads it."""
    return [_parameter(section, item) for section, item in _leaves()]


def environment_names() -> frozenset[str]:
    """Every variable that means something."""
    return frozenset(_variable(item.name) for _, item in _leaves())


_PARSERS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (parse_whole, "INTEGER"),
    float: (parse_number, "NUMBER"),
}
"""How a flag without a parser of its own is read, and called in the help."""


def serve_option(name: str, **changes: Any) -> Any:
    """The option of `lory serve` for that field, for another command that takes it too."""
    section, item = next(found for found in _leaves() if found[1].name == name)
    return _option(item, get_type_hints(_section_type(section.name))[name], **changes)


def check_environment(
    environ: Mapping[str, str] | None = None, *, command: str = "serve", taken: Sequence[str] = ()
) -> None:
    """Refuse variables that begin with LORY_ and mean nothing: they are misspelt settings.

    `taken` are the fields that a command other than serve takes; all others are refused too.
    """
    meant = {_variable(name) for name in taken} if taken else environment_names()
    known = sorted(environment_names())
    present = os.environ if environ is None else environ
    for name in sorted(present):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            guess = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {guess[0]}?" if guess else "see lory serve --help"
            raise ConfigError(f"{name}: no such environment variable; {hint}")
        if name in known and name not in meant:
            raise ConfigError(f"{name}: lory {command} does not take it; unset it or use serve")


def check_switches(environ: Mapping[str, str] | None = None) -> None:
    """Refuse a variable that switches something and is neither true nor false, with its value."""
    present = os.environ if environ is None else environ
    for section, item in _leaves():
        value = present.get(_variable(item.name))
        kind = get_type_hints(_section_type(section.name))[item.name]
        if kind is bool and value is not None and not is_switch(value):
            raise ConfigError(f"{_variable(item.name)}: {value!r}; write true or false")


_HUGE_PAGES = "glibc.malloc.hugetlb"
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def inherited_environment() -> dict[str, str]:
    """What a child process inherits: everything but our own settings and keys."""
    return {k: v for k, v in os.environ.items() if not k.startswith(ENVIRONMENT_PREFIX)}


def engine_environment() -> dict[str, str]:
    """The engine's, with malloc on huge pages, unless its tunables say otherwise: steps allocate
    and free megabytes, and faulting them in by 4 KiB takes a third of a prefill's time on a CPU."""
    kept = inherited_environment()
    tunables = kept.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        kept["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    return kept


def training_environment(num_threads: int, gpu: str = "") -> dict[str, str]:
    """What a fine-tuning job inherits: as the engine, so many threads that do not spin, and of the
    GPUs that the engine sees this one alone, if one is named. Raises `StartError`."""
    inherited = engine_environment()
    if gpu:
        seen = inherited.get(_VISIBLE, "")
        names = seen.split(",") if seen else [str(number) for number in range(int(gpu) + 1)]
        if int(gpu) >= len(names):
            raise StartError(f"--tuning-device: there is no cuda:{gpu} in {_VISIBLE}={seen}")
        inherited[_VISIBLE] = names[int(gpu)]
    return inherited | {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }


def wait_politely() -> None:
    """Before torch is loaded: its threads spin for microseconds, then leave the core to others.
    The demo's sentiment came to 442 steps in 22 s, beside one busy core to 156. With no spinning at
    all it was 215 on the idle machine; with no end of it, 31 in 45 s beside the busy core."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _leaves() -> Iterator[tuple[Field[Any], Field[Any]]]:
    for section in fields(ServeConfig):
        for item in fields(_section_type(section.name)):
            yield section, item


def _section_type(name: str) -> Any:
    return get_type_hints(ServeConfig)[name]


def _parameter(section: Field[Any], item: Field[Any]) -> inspect.Parameter:
    kind = get_type_hints(_section_type(section.name))[item.name]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=_option(item, kind), annotation=kind
    )


def _option(item: Field[Any], kind: Any, **changes: Any) -> Any:
    parser, metavar = _PARSERS.get(kind, (None, None))
    if item.metadata["parse"] is not None:
        parser, metavar = item.metadata["parse"], "SIZE"
    settings: dict[str, Any] = {
        "default": item.default,
        "help": item.metadata["help"],
        "envvar": _variable(item.name),
        "parser": parser,
        "metavar": metavar,
        "show_default": item.default != "",
    } | changes
    return typer.Option(settings.pop("default"), _declaration(item.name, kind), **settings)


def _declaration(name: str, kind: Any) -> str:
    return f"{_flag_name(name)}/--no-{name.replace('_', '-')}" if kind is bool else _flag_name(name)


def _flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return f"{ENVIRONMENT_PREFIX}{name.upper()}"


# -- checks ---------------------------------------------------------------------------------


def _check_bounds(item: Field[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, high = item.metadata["at_least"], item.metadata["at_most"]
    if not math.isfinite(value):
        raise ConfigError(f"{_flag_name(item.name)}: {value} is not a number to work with")
    if low is not None and value < low:
        raise ConfigError(f"{_flag_name(item.name)}: {value} is too small; at least {low}")
    if high is not None and value > high:
        raise ConfigError(f"{_flag_name(item.name)}: {value} is too large; at most {high}")


def _check_model(config: ServeConfig) -> None:
    model = config.model
    if not model.model:
        raise ConfigError("--model: name the base, a local folder or a hub id")
    is_path = model.model.startswith((".", "/", "~")) or Path(model.model).is_file()
    if is_path:
        _check_folder("--model", model.model)
    if model.adapters:
        _check_folder("--adapters", model.adapters)
    if model.adapters and (Path(model.adapters) / "adapter_config.json").is_file():
        raise ConfigError(
            f"--adapters: {model.adapters} is itself an adapter; give its parent, "
            f"{Path(model.adapters).resolve().parent}"
        )
    if model.warm_up and not (model.adapters or config.sources.adapter_cache):
        raise ConfigError("--warm-up: needs --adapters, the folder where they are")
    if model.double_quant and model.quantize == "none":
        raise ConfigError("--double-quant: needs --quantize nf4")


def _check_parts(config: ServeConfig) -> None:
    try:
        config.keys.check()
        config.sources.check(config.model.adapters)
        config.tuning.check(config.model.adapters)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_folder(name: str, folder: str) -> None:
    if Path(folder).is_file():
        raise ConfigError(f"{name}: {folder} is a file, not a folder")
    if not Path(folder).is_dir():
        raise ConfigError(f"{name}: there is no folder {folder}")


def _check_positive(config: ServeConfig) -> None:
    timeouts = {
        "step-timeout": config.step.step_timeout,
        "request-timeout": config.http.request_timeout,
        "max-body-bytes": config.limits.max_body_bytes,
    }
    for name, value in timeouts.items():
        if value <= 0:
            raise ConfigError(f"--{name}: must be more than 0")


def _check_steps(config: ServeConfig) -> None:
    step = config.step
    if step.max_step_tokens < step.max_batch_rows:
        raise ConfigError(
            f"--max-step-tokens: {step.max_step_tokens} cannot hold one token for each of "
            f"--max-batch-rows {step.max_batch_rows}; raise it or lower the rows"
        )
    context = config.model.max_model_len
    if context and config.limits.max_input_length >= context:
        raise ConfigError(
            f"--max-input-length: {config.limits.max_input_length} leaves no room for an answer "
            f"in --max-model-len {context}"
        )


def _check_memory(config: ServeConfig) -> None:
    memory = config.memory
    pools = memory.kv_memory + memory.adapter_memory + memory.full_weights_memory
    if memory.memory and pools > memory.memory:
        raise ConfigError(
            f"--memory: {memory.memory} bytes cannot hold --kv-memory, --adapter-memory and "
            f"--full-weights-memory ({pools} bytes together)"
        )
