"""`lory serve`, put together: engine, supervisor, metrics, HTTP application and signals.

The one place that knows all of them. What each does is its own module's business.

Exit codes: 0 after a drain, whether or not all requests finished in time; 1 when the server cannot
start or its engine cannot be kept running; 128 + the signal's number (130, 143) when a second
SIGINT or SIGTERM ends it at once, without waiting for anybody.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lory_router.app import create_app
from lory_router.base_check import ServedBase
from lory_router.config import (
    ServeConfig,
    StartError,
    engine_environment,
    training_environment,
)
from lory_router.connection import HttpServer, http_server
from lory_router.engine import Unavailable
from lory_router.engine_client import ChildEngine
from lory_router.engine_process import ENGINE_COMMAND
from lory_router.intake_openai import model_of
from lory_router.keys import Keyring, KeysError
from lory_router.listener import listen, room_for_connections, url_of
from lory_router.metrics import Metrics
from lory_router.registry import Registry
from lory_router.registry_file import RegistryError
from lory_router.sourced_engine import SourcedEngine
from lory_router.sources.disk import CacheFolderError
from lory_router.sources.metrics import SourceMetrics
from lory_router.sources.service import Sources
from lory_router.supervisor import GaveUp, RestartPolicy, Supervisor
from lory_router.text import TextModel, load_text_model
from lory_router.tuning.handover import Handover
from lory_router.tuning.meter import Meter
from lory_router.tuning.service import Tuning
from lory_router.tuning.store import TuningStoreError
from lory_router.values import comma_list
from lory_router.warmup import WarmUp
from lory_server.messages import FETCHED, EngineInfo

log = logging.getLogger("lory")

EXIT_FAILED = 1
EXIT_FORCED = 128
"""And the signal's number."""
ECHO_S = 0.5
"""A signal so soon after the first is the same: timeout(1) and others send it twice."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")

AfterReady = Callable[[str], Awaitable[int | None]]
"""Called with the server's URL once it answers; a number ends the server with that code."""


@dataclass(frozen=True)
class _Parts:
    """What runs, once everything is built."""

    engine: ChildEngine
    supervisor: Supervisor
    warm_up: WarmUp
    sourced: SourcedEngine | None
    tuning: Tuning | None
    server: HttpServer
    listener: socket.socket
    url: str
    keys: Keyring


@dataclass(frozen=True)
class _Launch:
    """What there is before anything runs."""

    config: ServeConfig
    listener: socket.socket
    text: TextModel
    registry: Registry
    keys: Keyring
    engine_command: tuple[str, ...]
    policy: RestartPolicy | None


def run(
    config: ServeConfig,
    *,
    after_ready: AfterReady | None = None,
    engine_command: tuple[str, ...] = ENGINE_COMMAND,
    policy: RestartPolicy | None = None,
) -> int:
    """Serve until told to stop; the exit code. Raises `StartError` before anything runs."""
    _configure_logging(config.http.log_level)
    listener = listen(config.http.host, config.http.port)
    if config.http.host not in LOOPBACK and config.keys.is_open:
        log.warning("open to everyone who reaches %s; set --api-key", config.http.host)
    keys = _read_keys(config)
    with listener:
        text = _load_text(config)
        log.info("loading %s, device %s", config.model.model, config.model.device)
        if not config.metrics.price_per_hour:
            log.info("no --price-per-hour: /metrics tells no costs")
        with contextlib.closing(_open_registry(config)) as registry:
            launch = _Launch(config, listener, text, registry, keys, engine_command, policy)
            return asyncio.run(_serve(launch, after_ready))


async def _serve(launch: _Launch, after_ready: AfterReady | None) -> int:
    config, parts = launch.config, _build(launch)
    _spare_collector()
    stopping = _Signals(parts)
    serving = asyncio.ensure_future(parts.server.serve(sockets=[parts.listener]))
    keeping = asyncio.ensure_future(parts.supervisor.run())
    visiting = asyncio.ensure_future(_visit(config, parts, after_ready))
    asked = asyncio.ensure_future(stopping.wait())
    training = asyncio.ensure_future(_train(parts))
    with stopping.installed():
        await asyncio.wait({serving, keeping, visiting, asked}, return_when=asyncio.FIRST_COMPLETED)
        visiting.cancel()
        parts.warm_up.stop()
        if parts.tuning is not None:
            parts.tuning.stop()
        code = await _shut_down(config, parts, keeping, serving)
    asked.cancel()
    await training
    if parts.sourced is not None:
        await parts.sourced.close()
    visited = (await asyncio.gather(visiting, return_exceptions=True))[0]
    if isinstance(visited, Exception):
        raise visited
    return code or (visited if isinstance(visited, int) else 0)


def _build(launch: _Launch) -> _Parts:
    config = launch.config
    settings, sources = config.router_settings(), _open_sources(config)
    meter = Meter(config.metrics.price_per_hour)
    metrics = Metrics(
        model=settings.model_names[0],
        price_per_hour=config.metrics.price_per_hour,
        max_adapter_labels=config.metrics.metrics_adapter_labels,
        name_of=lambda name: model_of(sources.name_of(name) if sources else name, settings),
        trained=meter.charged,
    )
    if sources is not None:
        metrics.add(SourceMetrics(sources))
    url = url_of(launch.listener)

    def on_info(info: EngineInfo) -> None:
        metrics.engine_up(info)
        _announce(info, url)
        warm_up.begin()

    engine = ChildEngine(
        config.engine_options(),
        environment=engine_environment(),
        on_info=on_info,
        on_report=metrics.engine_report,
        step_timeout_s=config.step.step_timeout,
        command=launch.engine_command,
    )
    tuning = _open_tuning(config, engine, launch.registry, meter)
    if tuning is not None:
        metrics.add(meter)
    sourced = SourcedEngine(engine, sources) if sources else None
    if sourced is not None:
        sourced.orders.hold_pinned(launch.registry.state.pins)
    warm_names = comma_list(config.model.warm_up)
    warm_up = WarmUp(engine, launch.registry, warm_names, sourced.orders if sourced else None)
    app = create_app(
        sourced or engine,
        settings,
        launch.text,
        metrics,
        launch.registry,
        warm_up.is_done,
        launch.keys,
        tuning,
        ServedBase(config.model.model, launch.text.chat_template),
    )
    server = http_server(app, room_for_connections(config.http.max_connections))
    supervisor = Supervisor(engine, metrics, launch.policy)
    return _Parts(
        engine, supervisor, warm_up, sourced, tuning, server, launch.listener, url, launch.keys
    )


async def _train(parts: _Parts) -> None:
    """Do fine-tuning jobs until stopped. Nobody waits for this before the end, so that what breaks
    it is told here."""
    if parts.tuning is None:
        return
    try:
        await parts.tuning.run()
    except Exception:
        log.exception("fine-tuning has stopped: start the server again; requests are served on")
    finally:
        parts.tuning.close()


def _spare_collector() -> None:
    """What is there before the first request lasts. Looking through it held up every stream for
    50 ms, each time that the collector looked through all."""
    gc.collect()
    gc.freeze()


def _open_tuning(
    config: ServeConfig, engine: ChildEngine, registry: Registry, meter: Meter
) -> Tuning | None:
    settings = config.tuning_settings
    if settings is None:
        return None
    if sys.platform != "linux":
        log.warning("--tuning-share: is kept on Linux alone; jobs run beside requests as they can")
    environment = training_environment(settings.threads, settings.gpu)
    handover = Handover(engine, registry)
    try:
        return Tuning(settings, environment, handover, meter, engine.serving)
    except (OSError, TuningStoreError) as error:
        raise StartError(f"--fine-tuning: {error}") from error


def _open_sources(config: ServeConfig) -> Sources | None:
    settings = config.source_settings
    try:
        return Sources(settings) if settings else None
    except CacheFolderError as error:
        raise StartError(f"--adapter-cache: {error}") from error


async def _visit(config: ServeConfig, parts: _Parts, after_ready: AfterReady | None) -> int | None:
    """Wait until requests are answered, then let the caller of `run` have its turn."""
    while not (parts.engine.is_ready() and parts.server.started):
        await asyncio.sleep(0.02)
    await parts.warm_up.check()
    with contextlib.suppress(Unavailable):
        entries = await parts.engine.list_adapters()
        names = [entry.adapter_id for entry in entries]
        _announce_adapters(config, [name for name in names if not name.startswith(FETCHED)])
    if after_ready is not None:
        code = await after_ready(parts.url)
        if code is not None:
            return code
    await asyncio.Event().wait()
    return None


async def _shut_down(
    config: ServeConfig,
    parts: _Parts,
    keeping: asyncio.Future[None],
    serving: asyncio.Future[None],
) -> int:
    """The way out: drain, stop the engine, let replies leave, and say what went wrong."""
    code = 0
    if not keeping.done():
        num_left = await parts.supervisor.drain(config.http.drain_timeout)
        if num_left:
            log.warning("%d requests did not finish in time and were cancelled", num_left)
    parts.server.should_exit = True
    parts.supervisor.stop()
    for part in (keeping, serving):
        try:
            await part
        except GaveUp as error:
            log.error("the engine cannot run: %s", error)
            code = EXIT_FAILED
    log.info("stopped")
    return code


class _Signals:
    """SIGTERM and SIGINT: the first asks, the second insists. SIGHUP reads the keys again."""

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        self._asked = asyncio.Event()
        self._asked_at = 0.0

    async def wait(self) -> None:
        await self._asked.wait()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        if self._parts.keys.has_file:  # without one it means that the terminal has gone
            loop.add_signal_handler(signal.SIGHUP, self._on_hang_up)
        try:
            yield
        finally:
            for number in (*signals, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self._asked.is_set():
            if now - self._asked_at > ECHO_S:
                log.warning("asked again: stopping at once")
                self._parts.engine.kill()
                os._exit(EXIT_FORCED + number)
            return
        self._asked_at = now
        log.info("stopping: new requests are refused, running ones may finish")
        self._asked.set()

    def _on_hang_up(self) -> None:
        """A file that cannot be read leaves the keys as they were: nobody is locked out by it."""
        try:
            num_keys = self._parts.keys.reload()
        except KeysError as error:
            log.error("--api-keys %s; the keys stay as they were", error)
        else:
            log.info("keys read again: %d", num_keys)


# -- before anything runs -------------------------------------------------------------------


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for chatty in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    # It warns of every request that is not HTTP: whoever can connect could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def _load_text(config: ServeConfig) -> TextModel:
    model = config.model.model
    try:
        return load_text_model(model)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        known = Path(model).is_dir()
        where = "" if known else "there is no such folder, and as a model of the hub "
        raise StartError(f"--model {model}: {where}its tokenizer cannot be read: {line}") from error


def _read_keys(config: ServeConfig) -> Keyring:
    try:
        return Keyring(comma_list(config.keys.api_key), config.keys.api_keys)
    except KeysError as error:
        raise StartError(f"--api-keys {error}") from error


def _open_registry(config: ServeConfig) -> Registry:
    path = config.model.registry
    if config.model.adapters and not path:
        log.info("no --registry: aliases, pins and removed adapters are forgotten at the end")
    try:
        return Registry(path)
    except RegistryError as error:
        raise StartError(f"--registry {error}") from error


def _announce_adapters(config: ServeConfig, names: Sequence[str]) -> None:
    folder, settings = config.model.adapters, config.router_settings()
    if not folder:
        log.info("no --adapters: the base alone")
    elif names:
        log.info("%d adapter%s in %s", len(names), "" if len(names) == 1 else "s", folder)
    else:
        log.warning("no adapter in %s; each is a sub-folder with an adapter_config.json", folder)
    for name in names:
        model = model_of(name, settings)
        if model != name:
            log.warning("adapter %r has the base's name: as OpenAI's `model` it is %r", name, model)


def _announce(info: EngineInfo, url: str) -> None:
    if info.memory_table:
        log.info("memory of the engine:")
    for name, num_bytes in info.memory_table:
        log.info("  %-24s %10.1f MiB", name, num_bytes / 2**20)
    log.info(
        "%s on %s, %s, quantize %s, context %d: loaded in %.1f s",
        info.architecture,
        info.device,
        info.dtype,
        info.quantize,
        info.max_model_len,
        info.load_seconds,
    )
    log.info("ready on %s", url)
