"""What runs before the first request: every class of step, and nothing is left of it."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import lory_kernels
import tiny_models
from lory_kernels import Segments, TorchOps, sgmv_choice
from lory_kernels.nf4_choice import RULES
from lory_server.build import compile_kernels, kernel_bytes, workspace_bytes
from lory_server.messages import EngineOptions
from lory_server.model.decoder import Decoder
from lory_server.model.kv import KVCache
from lory_server.model.load import load
from lory_server.model.lora import attach
from lory_server.model.warm_up import MAX_RANKS, NUM_TOKENS, warm_up
from test_model_lora import make_tables, random_factors


@dataclass
class Steps(TorchOps):
    """The reference's ops, and what SGMV was asked for."""

    seen: list[tuple[int, int]] = field(default_factory=list)
    attended: list[tuple[bool, int]] = field(default_factory=list)
    """Whether rows had one token each, and the keys that their tables have room for."""

    def paged_attention(self, qkv_TN: Any, k_cache: Any, v_cache: Any, tables_RM: Any, *more: Any,
                        **options: Any) -> None:  # fmt: skip
        room = tables_RM.shape[1] * k_cache.shape[2]
        self.attended.append((qkv_TN.shape[0] <= tables_RM.shape[0], room))
        super().paged_attention(qkv_TN, k_cache, v_cache, tables_RM, *more, **options)

    def sgmv(self, y_TN: Any, x_TH: Any, site: Any, pool: Any, segments: Segments) -> None:
        self.seen.append((segments.num_rows, segments.max_rank))
        super().sgmv(y_TN, x_TH, site, pool, segments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llama", tmp_path_factory.mktemp("llama"))


def loaded(folder: Path, ops: lory_kernels.Ops) -> tuple[Decoder, KVCache]:
    decoder = load(EngineOptions(model=str(folder)), "cpu", torch.float32, ops)
    tables, pool = make_tables(decoder.sites, random_factors(decoder.sites))
    attach(decoder, tables, pool)
    return decoder, KVCache.allocate(decoder.spec, 4, 4, torch.float32, "cpu")


def test_every_class_of_step_runs_and_no_key_is_written(folder: Path) -> None:
    ops = Steps()
    decoder, kv = loaded(folder, ops)
    assert warm_up(decoder, kv, 70, has_adapters=True) == 6 * 4 + 1
    assert {rows for rows, _ in ops.seen} == {2, 5, 17, 33, 65, 70}
    assert {rank for _, rank in ops.seen} == set(MAX_RANKS)
    assert not any(pages.any() for pages in (*kv.keys, *kv.values))


def test_a_base_without_adapters_runs_no_sgmv(folder: Path) -> None:
    ops = Steps()
    decoder, kv = loaded(folder, ops)
    assert warm_up(decoder, kv, 2, has_adapters=False) == 2
    assert not ops.seen


def test_attention_runs_as_for_decodes_and_as_for_prompts_with_contexts_that_split(
    folder: Path,
) -> None:
    """The first decode compiled its kernel within a step where nothing was captured."""
    ops = Steps()
    warm_up(*loaded(folder, ops), 5, has_adapters=False)
    assert {of_decode for of_decode, _ in ops.attended} == {True, False}
    assert min(room for _, room in ops.attended) >= 2 * 256


@pytest.mark.parametrize("source", [{"adapters_dir": "a"}, {"fetched_dir": "f"}, {}])
def test_adapters_from_any_source_have_their_kernels_compiled(
    source: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where adapters came from elsewhere than a folder, SGMV was compiled within a step."""
    asked: list[bool] = []
    monkeypatch.setattr("lory_server.build.warm_up", lambda *more: asked.append(more[-1]) or 1)
    world: Any = None
    compile_kernels(world, world, EngineOptions(model="m", **source))
    assert asked == [bool(source)]


def test_steps_cover_every_class_that_kernels_know() -> None:
    sizes = (*NUM_TOKENS, 4096, 8192)
    for rules in RULES.values():
        bounds = [0, *(rule.max_rows for rule in rules)]
        for low, high in pairwise(bounds):
            assert any(low < size <= high for size in sizes), (low, high)
    for element_bytes in sgmv_choice.RULES:
        for rows in range(1, 8193):
            for rank in (1, 16, 17, 33, 64, 65, 256):
                mine = _compiled(element_bytes, rows, rank)
                others = (_compiled(element_bytes, n, r) for n in sizes for r in MAX_RANKS)
                assert rows % 97 or mine in set(others), (rows, rank)


def _compiled(element_bytes: int, rows: int, rank: int) -> tuple[object, ...]:
    """What SGMV's kernels are compiled for."""
    cut = sgmv_choice.cut_up(element_bytes, True, rows, 1, rank, 4096, 3)
    return cut.rule, cut.shrink_rank, cut.expand_rank, cut.max_splits


def test_a_long_context_needs_no_workspace_of_its_own(folder: Path) -> None:
    """Attention keeps the parts of split contexts, and no scores."""
    decoder, _ = loaded(folder, TorchOps())
    options = EngineOptions(model=str(folder), max_batch_rows=64, max_step_tokens=512)
    spec = decoder.spec
    assert kernel_bytes(options, decoder) == 64 * spec.num_heads * 32 * (spec.head_dim + 1) * 4
    nf4 = EngineOptions(model=str(folder), max_batch_rows=64, quantize="nf4")
    largest = max(site.in_features * site.out_features for site in decoder.sites)
    assert kernel_bytes(nf4, decoder) == kernel_bytes(options, decoder) + 4 * largest


def test_the_workspace_holds_what_sampling_or_scoring_makes_of_the_logits(folder: Path) -> None:
    decoder, _ = loaded(folder, TorchOps())
    vocab_size = decoder.spec.vocab_size

    def workspace(rows: int, tokens: int) -> int:
        options = EngineOptions(model="", max_batch_rows=rows, max_step_tokens=tokens)
        return workspace_bytes(options, decoder)

    assert workspace(200, 64) - workspace(100, 64) == 100 * vocab_size * 64
    assert workspace(1, 6400) - workspace(1, 3200) > 3200 * vocab_size * 10
