"""An engine process without a model: speaks the protocol, does what its requests' adapters say.

    python fake_engine_process.py [--starts FILE] [--fatal TEXT] [--crash-starts N]
        [--load-seconds N] --fd N

A request's adapter_id is a script: "" echoes the prompt's tokens, "slow" gives a token every 20 ms,
"flood" gives thousands at once, "stuck" none, and "crash", "freeze", "garbage", "device-lost" end
the engine in their way. It must not know torch, and starts in a tenth of a second.
"""

import argparse
import os
import select
import signal
import socket
import time
from pathlib import Path

import msgspec

from lory_server.lifeline import die_with_parent
from lory_server.messages import (
    AdapterEntry,
    AdapterList,
    AdapterOrder,
    Cancel,
    Charge,
    Command,
    EngineInfo,
    EngineOptions,
    Event,
    Failure,
    Fatal,
    Finished,
    ListAdapters,
    OrderDone,
    StepEvents,
    StepReport,
    Submit,
    Token,
    Usage,
)

TICK_S = 0.02
HEARTBEAT_S = 0.1
FLOOD_TOKENS = 200
ADAPTERS = ("", "slow", "flood", "stuck", "crash", "freeze", "garbage", "device-lost")


class FakeEngine:
    """One life."""

    def __init__(self, line: socket.socket, ignores_hangup: bool) -> None:
        self._line = line
        self._ignores_hangup = ignores_hangup
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._received = b""
        self._running: dict[int, tuple[Submit, int]] = {}
        self._pins: set[str] = set()
        self._step = 0
        self._last = time.monotonic()

    def send(self, event: Event) -> None:
        body = msgspec.msgpack.encode(event)
        self._line.sendall(len(body).to_bytes(4, "big") + body)

    def options(self) -> EngineOptions:
        while not (commands := self._read(timeout_s=10)):
            pass
        assert isinstance(commands[0], EngineOptions)
        return commands[0]

    def serve(self) -> None:
        quiet_since = time.monotonic()
        while True:
            for command in self._read(TICK_S if self._running else HEARTBEAT_S):
                self._obey(command)
            if self._running or time.monotonic() - quiet_since >= HEARTBEAT_S:
                self.send(self._turn())
                quiet_since = time.monotonic()

    def _read(self, timeout_s: float) -> list[Command]:
        if not select.select([self._line], [], [], timeout_s)[0]:
            return []
        data = self._line.recv(1 << 20)
        if not data:
            self._hung_up()
        self._received += data
        commands: list[Command] = []
        while len(self._received) >= 4:
            end = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < end:
                break
            commands.append(self._decoder.decode(self._received[4:end]))
            self._received = self._received[end:]
        return commands

    def _hung_up(self) -> None:
        while self._ignores_hangup:
            time.sleep(1)
        os._exit(0)

    def _obey(self, command: Command) -> None:
        if isinstance(command, ListAdapters):
            entries = tuple(AdapterEntry(adapter_id=name, tier="disk") for name in ADAPTERS if name)
            self.send(AdapterList(call_id=command.call_id, adapters=entries))
        if isinstance(command, AdapterOrder):
            if command.kind == "pin":
                self._pins.add(command.adapter_id)
            self.send(_done(command))
        if isinstance(command, Cancel) and command.request_id in self._running:
            submit, sent = self._running.pop(command.request_id)
            finished = _finished(submit, command.reason, sent)
            self.send(StepEvents(report=self._report([]), finished=(finished,)))
        if isinstance(command, Submit):
            self._misbehave(command.adapter_id)
            if command.adapter_id in ADAPTERS:
                self._running[command.request_id] = (command, 0)
            else:
                self.send(StepEvents(report=self._report([]), finished=(_unknown(command),)))

    def _misbehave(self, script: str) -> None:
        if script == "crash":
            os._exit(3)
        if script == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if script == "garbage":
            self._line.sendall(b"\x00\x00\x00\x03abc")
        if script == "device-lost":
            self.send(Fatal(message="the device is lost"))
            os._exit(1)

    def _turn(self) -> StepEvents:
        tokens: list[Token] = []
        finished: list[Finished] = []
        rows = list(self._running.values())
        for submit, sent in rows:
            fresh = _next_tokens(submit, sent)
            tokens += fresh
            sent += len(fresh)
            self._running[submit.request_id] = (submit, sent)
            if sent >= submit.sampling.max_new_tokens:
                del self._running[submit.request_id]
                finished.append(_finished(submit, "length", sent))
        report = self._report([submit for submit, _ in rows])
        return StepEvents(report=report, tokens=tuple(tokens), finished=tuple(finished))

    def _report(self, rows: list[Submit]) -> StepReport:
        now = time.monotonic()
        wall, self._last = now - self._last, now
        self._step += bool(rows)
        charges = tuple(
            Charge(row.request_id, row.tenant, row.adapter_id, wall / len(rows), 0, 1)
            for row in rows
        )
        return StepReport(
            step=self._step,
            wall_seconds=wall,
            num_rows=len(rows),
            num_prompt_tokens=0,
            num_sampled=len(rows),
            num_running=len(self._running),
            num_waiting=0,
            blocks_used=len(rows),
            blocks_cached=2,
            blocks_total=100,
            prefix_queries=0,
            prefix_hits=0,
            preemptions=0,
            adapters_disk=len(ADAPTERS) - 1,
            adapters_host=0,
            adapters_device=0,
            adapter_host_bytes=0,
            adapter_device_bytes=0,
            pins_device=len(self._pins),
            charges=charges,
        )


def _next_tokens(submit: Submit, sent: int) -> list[Token]:
    if submit.adapter_id == "stuck":
        return []
    count = FLOOD_TOKENS if submit.adapter_id == "flood" else 1
    count = min(count, submit.sampling.max_new_tokens - sent)
    prompt = submit.prompt_ids
    return [
        Token(submit.request_id, prompt[(sent + place) % len(prompt)], -0.5)
        for place in range(count)
    ]


def _usage(submit: Submit, generated: int) -> Usage:
    return Usage(
        prompt_tokens=len(submit.prompt_ids),
        generated_tokens=generated,
        cached_tokens=0,
        queue_seconds=0.0,
        load_seconds=0.0,
        engine_seconds=0.0,
    )


def _finished(submit: Submit, reason: str, generated: int) -> Finished:
    return Finished(
        request_id=submit.request_id,
        reason=reason,  # type: ignore[arg-type]
        usage=_usage(submit, generated),
    )


def _done(order: AdapterOrder) -> OrderDone:
    if order.adapter_id not in ADAPTERS:
        failure = Failure(code="adapter_not_found", message=f"no adapter {order.adapter_id!r}")
        return OrderDone(call_id=order.call_id, entry=None, failure=failure)
    entry = AdapterEntry(adapter_id=order.adapter_id, tier="device")
    return OrderDone(call_id=order.call_id, entry=entry)


def _unknown(submit: Submit) -> Finished:
    failure = Failure(code="adapter_not_found", message=f"no adapter {submit.adapter_id}")
    return msgspec.structs.replace(_finished(submit, "error", 0), failure=failure)


def _info(options: EngineOptions) -> EngineInfo:
    return EngineInfo(
        model=options.model,
        architecture="Fake",
        device="cpu",
        dtype="float32",
        quantize="none",
        vocab_size=256,
        max_model_len=4096,
        eos_token_ids=(0,),
        num_blocks=100,
        block_size=16,
        max_batch_rows=8,
        max_step_tokens=64,
        pid=os.getpid(),
        memory_table=(("weights", 1 << 20),),
        load_seconds=0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--starts", type=Path)
    parser.add_argument("--fatal")
    parser.add_argument("--crash-starts", type=int, default=0)
    parser.add_argument("--load-seconds", type=float, default=0.0)
    parser.add_argument("--ignore-hangup", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    num_starts = 1
    if arguments.starts is not None:
        with arguments.starts.open("a") as file:
            file.write(f"{os.getpid()}\n")
        num_starts = len(arguments.starts.read_text().splitlines())
    engine = FakeEngine(socket.socket(fileno=arguments.fd), arguments.ignore_hangup)
    options = engine.options()
    if arguments.fatal:
        engine.send(Fatal(message=arguments.fatal))
        os._exit(1)
    if num_starts <= arguments.crash_starts:
        os._exit(9)
    time.sleep(arguments.load_seconds)
    engine.send(_info(options))
    engine.serve()


if __name__ == "__main__":
    main()
