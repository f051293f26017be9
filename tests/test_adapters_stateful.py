"""Whatever operators and callers do with adapters in whatever order: every request ends once with
its own revision's answer, every order is answered, and nothing is left.

Beside the storm of `test_engine_storm`: merges, an aLoRA, names of equal bytes, bytes that come
back; and a sequence that fails is made as short as it can be.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import booleans, integers, sampled_from

from adapter_files import BASE, write_adapter
from lory_server.adapters.blob import read_blob
from lory_server.adapters.format import read_manifest
from lory_server.adapters.store import AdapterStore
from lory_server.messages import Cancel, Finished, ListAdapters, OrderDone, Sampling, Submit
from lory_server.recipes import MergeSource, Recipe, merged_id
from lory_server.sequence import activation_of
from simulated import alone
from test_engine_storm import NAMES, ORDERS, Storm

INVOKED = "act"
INVOCATION = (7,)
FILES = [*NAMES[:3], INVOKED]


def merge_of(*sources: tuple[str, float], name: str = "") -> str:
    of = tuple(MergeSource(*source) for source in sources)
    return merged_id(Recipe(sources=of, name=name))


MERGES = [
    merge_of(("a0", 1.0), ("a1", 0.5)),
    merge_of(("a0", 1.0), ("a1", 0.5), name="blend"),
    merge_of(("a2", -1.0)),
    merge_of(("a0", 1.0), (INVOKED, 1.0)),
]
"""Two that are equal, one of one, and one that is always refused."""
CALLED = [*FILES, *MERGES]
PRESETS = integers(0, 2)
"""Bytes that an adapter may have: equal for all names but the aLoRA's."""


class LifeStorm(Storm):
    def write(self, name: str, seed: int) -> None:
        """A new version, moved into place whole."""
        fresh = self.root.parent / "fresh"
        fields = {"alora_invocation_tokens": list(INVOCATION), "task_type": "CAUSAL_LM"}
        more = fields if name == INVOKED else {}
        write_adapter(fresh, rank=(2, 4, 8)[seed], seed=seed, **more)
        with AdapterStore(fresh.parent).locate("fresh") as files:
            manifest = read_manifest(files.config_fd, files.weights_fd, BASE)
            blob = read_blob(files.weights_fd, manifest, torch.float32)
        self.versions.setdefault(name, []).append(blob.revision)
        shutil.rmtree(self.root / name, ignore_errors=True)
        fresh.rename(self.root / name)

    def ask(self, name: str, prompt: tuple[int, ...], max_new_tokens: int) -> None:
        sampling = Sampling(max_new_tokens=max_new_tokens, seed=0, ignore_eos=True)
        request_id = len(self.commands)
        command = Submit(
            request_id=request_id, prompt_ids=prompt, sampling=sampling, adapter_id=name
        )
        self.commands[request_id] = command
        self.since[request_id] = len(self.versions.get(name, ()))
        self.engine.submit(command)

    def take_done(self, done: OrderDone) -> None:
        order = self.orders.pop(done.call_id)
        self.done[order.kind, done.failure.code if done.failure else "done"] += 1
        assert (done.failure is None) == (done.entry is not None)
        if order.kind in ("unpin", "drop"):
            assert done.failure is None
        if done.entry is not None:
            assert done.entry.adapter_id == order.adapter_id
            is_told = order.adapter_id in FILES and order.kind in ("find", "load", "pin")
            assert not is_told or done.revision in self.versions[order.adapter_id]

    def check_answer(self, command: Submit, finished: Finished) -> None:
        name, failure = command.adapter_id, finished.failure
        answer, revision = self.answers[command.request_id], finished.adapter_revision
        if failure is not None:
            told = ("adapter_not_found", "adapter_invalid", "adapter_capacity", "overloaded")
            assert failure.code in told, failure
            assert name or failure.code == "overloaded"
            return
        if name in FILES and finished.reason == "length":
            assert revision in self.versions[name][self.since[command.request_id] - 1 :]
        assert (name != MERGES[3]) or finished.reason == "cancelled"
        activation = activation_of(command.prompt_ids, INVOCATION if name == INVOKED else ())
        weights = "base" if activation is None or not revision else revision
        expected = alone(list(command.prompt_ids), command.sampling, weights, activation or 0)
        assert answer == expected[: len(answer)]
        assert finished.reason != "length" or answer == expected

    def check_nothing_is_left(self) -> None:
        for name in CALLED:
            self.order("drop", name)
        self.finish()
        cache, orders = self.cache, self.engine._orders
        assert not any(entry.holds for entry in cache.host._entries.values())
        assert not cache.device.pinned
        for left in (orders._arriving, orders._resolving, orders._leaving, orders._pins):
            assert not left
        assert (len(cache.host), len(cache.device)) == (0, 0)
        assert cache.device.pool.used_bytes == cache.budget.used_bytes == 0
        assert self.engine._scheduler.pool.num_used == 0
        assert not cache._tickets
        assert not cache._loads


class AdapterLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name) / "adapters"
        root.mkdir()
        self.storm = LifeStorm(root, seed=1, depth=1)
        self.storm.write(INVOKED, 1)

    @rule(name=sampled_from(["", *CALLED, *FILES]), invoked=booleans(), size=integers(1, 20))
    def request(self, name: str, invoked: bool, size: int) -> None:
        prompt = (*range(10, 10 + size), *(INVOCATION if invoked else ()), 30)
        self.storm.ask(name, prompt, 1 + size % 9)

    @rule(back=integers(1, 6))
    def cancel(self, back: int) -> None:
        self.storm.engine.cancel(Cancel(request_id=len(self.storm.commands) - back))

    @rule(kind=sampled_from(ORDERS), name=sampled_from(CALLED), at=sampled_from([None, None, 0, 1]))
    def order(self, kind, name: str, at: int | None) -> None:
        known = self.storm.versions.get(name, [])
        revision = known[-1 - at][:8] if at is not None and at < len(known) else ""
        self.storm.order(kind, name, revision)

    @rule(name=sampled_from(FILES), seed=PRESETS)
    def replace(self, name: str, seed: int) -> None:
        self.storm.write(name, seed)

    @rule(name=sampled_from(FILES))
    def delete(self, name: str) -> None:
        shutil.rmtree(self.storm.root / name, ignore_errors=True)

    @rule()
    def list(self) -> None:
        self.storm.calls += 1
        self.storm.engine.list_adapters(ListAdapters(call_id=self.storm.calls))

    @rule(number=integers(1, 12))
    def turns(self, number: int) -> None:
        for _ in range(number):
            self.storm.turn()

    @invariant()
    def free_and_used_are_all(self) -> None:
        self.storm.engine.check()
        self.storm.cache.host.check()

    def teardown(self) -> None:
        try:
            self.storm.finish()
            self.storm.check_end()
            self.storm.check_nothing_is_left()
        finally:
            self.storm.engine.close()
            self.folder.cleanup()


TestAdapterLife = AdapterLife.TestCase
TestAdapterLife.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)
