"""The engine beside transformers + PEFT: one machine, one shape, one workload, in turn.

Both have a base of the 8B shape in NF4 with random weights of their own, and as many rank-16
adapters; both get the same prompts at once and make as many tokens of each. PEFT runs them as one
static batch, with `adapter_names` where they are mixed; that it is not made for that is the point.
It must not know where results go.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from benchmarks import gpu_curve, gpu_train
from benchmarks.deadline import Deadline
from benchmarks.engine_drive import Driver, Request, smooth
from benchmarks.gpu_adapters import written
from benchmarks.gpu_base import model_name
from benchmarks.peft_peer import run_batch
from lory_router.bench.workload import FIRST_TOKEN_ID
from lory_trainer.base import lora_config
from lory_trainer.config import LoraOptions

LORY, PEFT = "Lory", "transformers + PEFT"
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Scale:
    curve: gpu_curve.Scale
    """The engine's."""
    train: gpu_train.Scale
    """The shape, as transformers has it."""
    requests: int
    prompt_tokens: int
    output_tokens: int
    runs: int
    budget_s: float
    """No case beyond it starts."""


def _curve_of(scale: gpu_curve.Scale, count: int) -> gpu_curve.Scale:
    """As many adapters as fit the device at once."""
    return replace(scale, counts=(count,), resident=count, rows=count, other_ranks=(), readers=0)


FULL = Scale(
    curve=_curve_of(gpu_curve.FULL, 32),
    train=replace(gpu_train.FULL, length=1024),
    requests=32,
    prompt_tokens=64,
    output_tokens=64,
    runs=3,
    budget_s=400.0,
)
TINY = Scale(
    curve=_curve_of(gpu_curve.TINY, 3),
    train=replace(gpu_train.TINY, vocab_size=256),
    requests=3,
    prompt_tokens=4,
    output_tokens=3,
    runs=1,
    budget_s=60.0,
)

Keep = Callable[[dict[str, Any]], None]
Say = Callable[[str], None]
Contender = Callable[[Sequence[tuple[int, ...]], Sequence[str], int], float]
"""Prompts, the adapter of each, and how many tokens to make; the seconds it took."""


def measure(
    scale: Scale,
    device: torch.device,
    cuda_graphs: bool,
    deadline: Deadline,
    keep: Keep,
    say: Say,
) -> dict[str, Any]:
    """The findings, kept after each case."""
    curve = scale.curve
    wishes = gpu_curve.Wishes(0.0, cuda_graphs=cuda_graphs)
    found = _facts(scale)
    with (
        written((curve.kin,)) as folder,
        gpu_curve.built(curve, device, wishes, folder) as (driver, facts),
        smooth(),
    ):
        found["build_s"] = facts["build_s"]
        names = curve.kin.names[: scale.requests]
        model = peft_model(scale, names, device)
        say(f"both built: {names[0]} to {names[-1]}")
        contenders = {LORY: _lory(driver), PEFT: _peft(model)}
        for case, adapters in cases_of(names).items():
            if deadline.is_over:
                found["not_reached"].append(case)
                continue
            one = _case(scale, contenders, adapters, deadline)
            found["cases"][case] = one
            say(f"{case}: " + ", ".join(f"{name} {rate:,.1f}" for name, rate in _rates(one)))
            keep(found)
    return found | {"passed": bool(found["cases"])}


def cases_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The adapter of each request."""
    return {
        "base": ("",) * len(names),
        "one": (names[0],) * len(names),
        "distinct": tuple(names),
    }


def _case(
    scale: Scale,
    contenders: dict[str, Contender],
    adapters: Sequence[str],
    deadline: Deadline,
) -> dict[str, Any]:
    """Contenders in turn, after a short warm-up of each; medians of the runs there was time for."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, run in contenders.items():
        run(_prompts(scale, f"warm-up {name}"), adapters, WARM_UP_TOKENS)
    for number in range(scale.runs):
        if number and deadline.is_over:
            break
        for name, run in contenders.items():
            prompts = _prompts(scale, str(number))
            seconds[name].append(run(prompts, adapters, scale.output_tokens))
    tokens = scale.requests * scale.output_tokens
    return {
        name: {
            "output_tokens_per_s": round(tokens / statistics.median(times), 2),
            "wall_s": [round(one, 4) for one in times],
        }
        for name, times in seconds.items()
    }


def _rates(case: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, one["output_tokens_per_s"]) for name, one in case.items()]


def _prompts(scale: Scale, seed: str) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    tokens = range(FIRST_TOKEN_ID, scale.train.vocab_size)
    return [tuple(draw.choices(tokens, k=scale.prompt_tokens)) for _ in range(scale.requests)]


def _lory(driver: Driver) -> Contender:
    def run(prompts: Sequence[tuple[int, ...]], adapters: Sequence[str], tokens: int) -> float:
        pairs = zip(prompts, adapters, strict=True)
        began_s = time.perf_counter()
        driver.answer([Request(adapter, prompt, tokens) for prompt, adapter in pairs])
        return time.perf_counter() - began_s

    return run


def _peft(model: PeftModel) -> Contender:
    def run(prompts: Sequence[tuple[int, ...]], adapters: Sequence[str], tokens: int) -> float:
        wall_s, made_RT = run_batch(model, prompts, adapters, tokens)
        if made_RT.numel() != len(prompts) * tokens:
            raise RuntimeError(f"transformers made {made_RT.numel()} tokens")
        return wall_s

    return run


def peft_model(scale: Scale, names: Sequence[str], device: torch.device) -> PeftModel:
    """All adapters loaded, in the base's own dtype: PEFT leaves them in float32 on 4-bit layers."""
    base = gpu_train.nf4_base(scale.train, device)
    base.generation_config.eos_token_id = None
    config = lora_config(LoraOptions(r=scale.curve.rank))
    config.init_lora_weights = False  # random, as served ones are: B would be zeros
    model: Any = get_peft_model(base, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(device, base.dtype)
    return model.eval()


def _facts(scale: Scale) -> dict[str, Any]:
    return {
        "passed": False,
        "model": model_name(scale.curve.spec),
        "rank": scale.curve.rank,
        "requests": scale.requests,
        "prompt_tokens": scale.prompt_tokens,
        "output_tokens": scale.output_tokens,
        "cases": {},
        "not_reached": [],
    }
