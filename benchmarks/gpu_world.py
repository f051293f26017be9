"""Small random bases of every family, adapters for them, and engines that answer with them.

What the GPU checks compare: the same requests to an engine on the CPU in float32 and to engines on
the device. It must not know tolerances or what counts as equal.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lory_server.build import build
from lory_server.engine import Engine
from lory_server.messages import EngineOptions, Finished, Sampling, Submit
from lory_server.model.families import read_spec

VOCAB_SIZE = 512
ANSWER_TIMEOUT_S = 120.0
RANKS = (16, 4, 33, 64)
"""Of the adapters a00, a01, ...; 33 shows tiles that are not full. Every other one is DoRA."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 512},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {
        "head_dim": 256,
        "sliding_window": 16,
        "query_pre_attn_scalar": 48,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 20.0,
    },
    "phi3": {},
}


@dataclass(frozen=True)
class World:
    """A base on disk and adapters for it."""

    base: Path
    adapters_dir: Path
    names: tuple[str, ...]

    def options(self, **changes: Any) -> EngineOptions:
        fields: dict[str, Any] = {
            "model": str(self.base),
            "adapters_dir": str(self.adapters_dir),
            "max_batch_rows": 16,
            "max_step_tokens": 64,
            "block_size": 8,
            "kv_bytes": 64 << 20,
            "adapter_pool_bytes": 64 << 20,
            "adapter_host_bytes": 64 << 20,
            "prefix_caching": False,
            "reader_processes": 0,
        }
        return EngineOptions(**(fields | changes))


@dataclass
class Answer:
    """What came back of one request."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Of each token: by how much its log-probability beat the second best."""
    logprobs: list[float] = field(default_factory=list)
    """Of the best token at each place."""
    prompt_logprobs: tuple[float, ...] = ()
    finished: Finished | None = None


@dataclass(frozen=True)
class Run:
    """All answers of one engine, and how hard it was pressed."""

    answers: list[Answer]
    preemptions: int
    evictions: int


def make_world(family: str, folder: Path, seed: int = 0) -> World:
    """Weights wide enough that another adapter moves the logits far beyond any rounding."""
    disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_SHAPE | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(std=1.0 / math.sqrt(weight.shape[1]))
            elif weight.ndim == 2:
                weight.normal_(std=0.3 if family == "gemma2" else 1.0)
    base = folder / family
    # Stored in bfloat16: cast to any dtype and quantized, it is the same base.
    model.to(torch.bfloat16).save_pretrained(base)
    names = tuple(f"a{number:02d}" for number in range(len(RANKS)))
    for number, (name, rank) in enumerate(zip(names, RANKS, strict=True)):
        adapter = folder / f"{family}-adapters" / name
        _make_adapter(base, adapter, rank, seed=seed + 100 + number, use_dora=bool(number % 2))
    return World(base, folder / f"{family}-adapters", names)


def _make_adapter(base: Path, folder: Path, rank: int, seed: int, use_dora: bool) -> None:
    """On every projection of the base, whatever the family calls them. The norm of a row of the
    base is about 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    modules: set[str] = set()
    for site in read_spec(base).sites():
        for part in site.slices:
            prefix = f"base_model.model.{part.module}"
            a_RK = torch.randn(rank, site.in_features, generator=generator)
            b_NR = torch.randn(part.out_features, rank, generator=generator)
            tensors[f"{prefix}.lora_A.weight"] = a_RK / math.sqrt(site.in_features)
            tensors[f"{prefix}.lora_B.weight"] = b_NR * 0.7 / math.sqrt(rank)
            if use_dora:
                magnitude_N = 0.7 + 0.6 * torch.rand(part.out_features, generator=generator)
                tensors[f"{prefix}.lora_magnitude_vector"] = magnitude_N
            modules.add(part.module.rpartition(".")[2])
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        "use_dora": use_dora,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def requests(
    world: World, count: int, *, scored: bool, seed: int = 0, long_prompt: int = 0
) -> list[Submit]:
    """Base rows and every adapter in turn; `scored` asks for the prompts' log-probabilities.

    The last prompt has `long_prompt` tokens, unless that is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = ("", *world.names)
    found: list[Submit] = []
    for number in range(count):
        length = long_prompt if long_prompt and number == count - 1 else 5 + 7 * (number % 5)
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        sampling = Sampling(
            max_new_tokens=1 if scored else 24,
            seed=number,
            ignore_eos=True,
            num_top_logprobs=2,
            prompt_logprobs=scored,
        )
        adapter = adapters[number % len(adapters)]
        found.append(
            Submit(
                request_id=number, prompt_ids=tuple(prompt), sampling=sampling, adapter_id=adapter
            )
        )
    return found


def rotated(world: World, commands: Sequence[Submit]) -> list[Submit]:
    """The same requests, each on the next adapter: what a mix-up would answer."""
    names = ("", *world.names)
    following = dict(zip(names, (*names[1:], names[0]), strict=True))
    return [
        Submit(
            request_id=command.request_id,
            prompt_ids=command.prompt_ids,
            sampling=command.sampling,
            adapter_id=following[command.adapter_id],
        )
        for command in commands
    ]


def answer(options: EngineOptions, commands: Sequence[Submit], depth: int | None = None) -> Run:
    """Every request at once through an engine of its own. Raises RuntimeError if one fails.

    Each adapter is asked for once before, so that no run depends on how fast they load.
    """
    with _engine(options, depth) as (engine, wake):
        adapters = sorted({command.adapter_id for command in commands})
        one_token = Sampling(max_new_tokens=1, seed=0, num_top_logprobs=2)
        first = [
            Submit(request_id=i, prompt_ids=(3,), sampling=one_token, adapter_id=adapter)
            for i, adapter in enumerate(adapters)
        ]
        _collect(engine, wake, first)
        run = _collect(engine, wake, commands)
        engine.check()
    failures = {
        one.finished.failure.message for one in run.answers if one.finished and one.finished.failure
    }
    if failures:
        raise RuntimeError(f"a request failed: {'; '.join(sorted(failures))}")
    return run


@contextmanager
def _engine(options: EngineOptions, depth: int | None) -> Iterator[tuple[Engine, threading.Event]]:
    wake = threading.Event()
    engine, _ = build(options, wake.set)
    if depth is not None:
        # The device fixes the depth; both are wanted here, to show that they answer alike.
        engine._limits = replace(engine._limits, pipeline_depth=depth)
    try:
        yield engine, wake
    finally:
        engine.close()


def _collect(engine: Engine, wake: threading.Event, commands: Sequence[Submit]) -> Run:
    """Submits requests 0, 1, 2 ... and drives the engine until all have ended."""
    answers = [Answer() for _ in commands]
    for command in commands:
        engine.submit(command)
    preemptions = evictions = 0
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while not all(one.finished for one in answers):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no end within {ANSWER_TIMEOUT_S:g} s")
        engine.step()
        events = engine.events()
        preemptions += events.report.preemptions
        evictions += sum(
            (move.kind, move.tier) == ("evict", "device") for move in events.report.moves
        )
        for scored in events.prompts:
            answers[scored.request_id].prompt_logprobs = scored.logprobs
        for token in events.tokens:
            answers[token.request_id].tokens.append(token.token_id)
            answers[token.request_id].logprobs.append(token.top[0][1])
            answers[token.request_id].margins.append(token.top[0][1] - token.top[1][1])
        for finished in events.finished:
            answers[finished.request_id].finished = finished
        if not engine.can_step:
            wake.wait(0.05)
            wake.clear()
    return Run(answers, preemptions, evictions)
