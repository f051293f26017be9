"""An engine over a tiny base and eight different adapters, and the answers PEFT gives alone.

Every token is checked against the logits that transformers + PEFT compute for the same tokens:
it must be the best one. Where the reference's two best logits are within NEAR_TIE of each other,
sums in another order may choose either; such positions are counted and must stay rare.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tiny_models
from lory_server.build import build
from lory_server.engine import Engine
from lory_server.messages import (
    Cancel,
    EngineOptions,
    Finished,
    PromptLogprobs,
    Sampling,
    StepReport,
    Submit,
    Token,
)

NEAR_TIE = 1e-4
MAX_NEAR_TIES = 0.01
"""Share of positions that may be near ties."""

FUSED = {
    "all": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "attention": ["qkv_proj", "o_proj"],
    "qv": ["qkv_proj"],
    "mlp": ["gate_up_proj", "down_proj"],
    "regex": r".*\.(qkv_proj|down_proj)",
    "one": "o_proj",
}
SPLIT = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qv": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "regex": r".*\.(k_proj|down_proj)",
    "one": "q_proj",
}


def make_adapters(family: str, base: Path, folder: Path) -> dict[str, Path]:
    """Eight adapters that differ in rank, scale, targets, layers and dtype."""
    targets = FUSED if family == "phi3" else SPLIT
    one = targets["one"]
    recipes: dict[str, dict[str, Any]] = {
        "all-16": {"rank": 16, "alpha": 32, "target_modules": targets["all"]},
        "linear-8": {"rank": 8, "alpha": 8, "target_modules": "all-linear"},
        "qv-1": {"rank": 1, "alpha": 2, "target_modules": targets["qv"]},
        "mlp-3": {"rank": 3, "alpha": 6, "target_modules": targets["mlp"], "use_rslora": True},
        "attention-33": {
            "rank": 33,
            "alpha": 16,
            "target_modules": targets["attention"],
            "dtype": torch.bfloat16,
        },
        "team/regex-64": {"rank": 64, "alpha": 16, "target_modules": targets["regex"]},
        "team/pattern": {
            "rank": 4,
            "alpha": 8,
            "target_modules": targets["all"],
            "rank_pattern": {one: 12, "down_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
        "last-256": {
            "rank": 256,
            "alpha": 64,
            "target_modules": targets["attention"],
            "layers_to_transform": [1],
            "dtype": torch.float16,
        },
    }
    return save_adapters(recipes, base, folder)


def save_adapters(recipes: dict[str, dict[str, Any]], base: Path, folder: Path) -> dict[str, Path]:
    return {
        name: tiny_models.save_adapter(folder / name, base, seed=100 + i, **recipe)
        for i, (name, recipe) in enumerate(recipes.items())
    }


MakeAdapters = Callable[[str, Path, Path], dict[str, Path]]
"""From a family, the base's folder and the adapters': each adapter's folder by its name."""


def small_options(base: Path, folder: Path, /, **changes: Any) -> EngineOptions:
    """Of an engine whose batches, steps and blocks are small enough to be filled by a test.

    `folder` is of its adapters; a change names `adapters_dir` for another, or for none.
    """
    fields: dict[str, Any] = {
        "model": str(base),
        "adapters_dir": str(folder),
        "device": "cpu",
        "dtype": "float32",
        "max_batch_rows": 12,
        "max_step_tokens": 40,
        "block_size": 8,
        "kv_bytes": 1 << 20,
        "adapter_pool_bytes": 8 << 20,
        "adapter_host_bytes": 64 << 20,
        "reader_processes": 0,  # half the time to build an engine; one test has one
    }
    return EngineOptions(**(fields | changes))


@dataclass
class ParityWorld:
    family: str
    base: Path
    adapters_dir: Path
    adapters: dict[str, Path]

    @classmethod
    def make(
        cls, family: str, folder: Path, make_adapters: MakeAdapters = make_adapters, **fields: Any
    ) -> "ParityWorld":
        """`fields` are of the base's configuration."""
        # A random tied head repeats its input, whatever the adapter: nothing would be compared.
        fields = {"tie_word_embeddings": False} | fields
        base = tiny_models.build(family, folder / "base", **fields)
        adapters = folder / "adapters"
        return cls(family, base, adapters, make_adapters(family, base, adapters))

    def options(self, **changes: Any) -> EngineOptions:
        return small_options(self.base, self.adapters_dir, **changes)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    finished: Finished | None = None


class Session:
    """Drives an engine as its process does, and keeps what it says."""

    def __init__(self, options: EngineOptions, pipeline_depth: int = 0) -> None:
        self._wake = threading.Event()
        self.engine: Engine
        self.engine, self.info = build(options, self._wake.set)
        # A CPU has nothing to overlap with; CUDA runs the same code at depth 1.
        limits = replace(self.engine._limits, pipeline_depth=pipeline_depth)
        self.engine._limits = limits
        self.answers: dict[int, Answer] = {}
        self.prompts: dict[int, Submit] = {}
        self.reports: list[StepReport] = []

    def submit(
        self,
        request_id: int,
        prompt: Iterable[int],
        adapter_id: str = "",
        *,
        revision: str = "",
        tenant: str = "default",
        manner: str = "",
        **fields: Any,
    ) -> None:
        sampling = Sampling(**{"max_new_tokens": 12, "seed": request_id, **fields})
        command = Submit(
            request_id=request_id,
            prompt_ids=tuple(prompt),
            sampling=sampling,
            adapter_id=adapter_id,
            adapter_revision=revision,
            manner=manner,
            tenant=tenant,
        )
        self.prompts[request_id] = command
        self.answers[request_id] = Answer()
        self.engine.submit(command)

    def cancel(self, request_id: int) -> None:
        self.engine.cancel(Cancel(request_id=request_id))

    def step(self) -> None:
        self.engine.step()
        events = self.engine.events()
        self.reports.append(events.report)
        for scored in events.prompts:
            self._take_scored(scored)
        for token in events.tokens:
            self._take_token(token)
        for finished in events.finished:
            answer = self.answers[finished.request_id]
            assert answer.finished is None, "two terminal events"
            answer.finished = finished

    def run(self, until: Callable[[], bool] | None = None, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not (until() if until else self.is_done):
            assert time.monotonic() < deadline, "the engine does not come to an end"
            self.step()
            if not self.engine.can_step:
                self._wake.wait(0.05)
                self._wake.clear()

    @property
    def is_done(self) -> bool:
        return all(answer.finished for answer in self.answers.values())

    def _take_scored(self, scored: PromptLogprobs) -> None:
        self.answers[scored.request_id].prompt_logprobs = scored.logprobs
        self.answers[scored.request_id].prompt_top = scored.top

    def _take_token(self, token: Token) -> None:
        answer = self.answers[token.request_id]
        assert answer.finished is None, "a token after the terminal event"
        answer.tokens.append(token.token_id)
        answer.logprobs.append(token.logprob)

    @property
    def preemptions(self) -> int:
        return sum(report.preemptions for report in self.reports)

    def moves(self, kind: str, tier: str) -> int:
        moves = [move for report in self.reports for move in report.moves]
        return sum(1 for move in moves if (move.kind, move.tier) == (kind, tier))

    def close(self) -> None:
        """After everything has ended: nothing may be left behind."""
        if self.is_done:
            adapters = self.engine._adapters
            while self.engine.can_step or adapters.residency().loading:
                self.step()
            self.engine.check()
            assert self.reports[-1].blocks_used == 0
            entries = adapters.host._entries.values()
            assert not any(entry.holds for entry in entries), "a revision is held by nobody"
        self.engine.close()


class Reference:
    """transformers + PEFT, one request at a time; the base may be quantized."""

    def __init__(self, base: Path, load: Callable[[Path], Any] | None = None) -> None:
        self._base = base
        self._load = load or (lambda folder: tiny_models.load_reference(folder, torch.float32))
        self._model = cache(self._adapted)

    def _adapted(self, adapter: Path | None) -> Any:
        model = self._load(self._base)
        if adapter is None:
            return model
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(adapter)).eval()

    @torch.inference_mode()
    def logits(self, tokens: list[int], adapter: Path | None) -> torch.Tensor:
        return self._model(adapter)(torch.tensor([tokens])).logits[0].float()


@dataclass
class Comparison:
    positions: int = 0
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, prompt: list[int], answer: list[int], logits: torch.Tensor) -> None:
        """`logits` are of prompt + answer."""
        for i, token in enumerate(answer):
            best = logits[len(prompt) + i - 1].topk(2)
            self.positions += 1
            if token == best.indices[0]:
                continue
            if token == best.indices[1] and best.values[0] - best.values[1] < NEAR_TIE:
                self.near_ties += 1
            else:
                self.wrong.append(f"{name}: token {i} is {token}, PEFT says {best.indices[0]}")

    def check(self) -> None:
        assert not self.wrong, self.wrong[:5]
        assert self.positions > 0
        assert self.near_ties <= MAX_NEAR_TIES * self.positions, f"{self.near_ties} near ties"


def compare(
    session: Session,
    reference: Reference,
    adapters: dict[str, Path],
    *,
    may_fail: bool = False,
) -> Comparison:
    """Every answer so far, cancelled ones as far as they came. A refused request is wrong, unless
    some `may_fail`."""
    comparison = Comparison()
    for request_id, answer in session.answers.items():
        command = session.prompts[request_id]
        prompt = list(command.prompt_ids)
        if answer.finished and answer.finished.failure and not may_fail:
            failure = answer.finished.failure
            comparison.wrong.append(f"{command.adapter_id}: {failure.message}")
        if not answer.tokens:
            continue
        logits = reference.logits(prompt + answer.tokens, adapters.get(command.adapter_id))
        comparison.add(command.adapter_id or "base", prompt, answer.tokens, logits)
    return comparison
