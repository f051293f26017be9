"""Gains and biases as PEFT would have them, over any base, beside the steps, or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_files import SITES, Tensors, make_folder, write_adapter
from lory_server.adapters import fold as fold_module
from lory_server.adapters.blob import AdapterBlob, read_blob
from lory_server.adapters.errors import AdapterInvalidError
from lory_server.adapters.fold import BaseFolder
from lory_server.adapters.format import AdapterSlice, Base, read_manifest
from lory_server.adapters.store import AdapterStore

BIASED = tuple(replace(site, has_bias=site.name.endswith("qkv")) for site in SITES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DORA: dict[str, Any] = {"use_dora": True}
LORA_BIAS: dict[str, Any] = {"lora_bias": True, "bias": "lora_only"}
EVERYWHERE: dict[str, Any] = {"use_dora": True, "bias": "all", "modules": ("q_proj", "o_proj")}


def blob_of(root: Path, name: str, dtype: torch.dtype) -> AdapterBlob:
    with AdapterStore(root).locate(name) as files:
        manifest = read_manifest(files.config_fd, files.weights_fd, Base(BIASED))
        return read_blob(files.weights_fd, manifest, dtype)


def write(folder: Path, rank: int = 3, **fields: Any) -> None:
    write_adapter(folder, rank, sites=BIASED, **fields)


def numbers(blob: AdapterBlob, part: AdapterSlice, starts: dict[Any, int]) -> dict[str, Tensor]:
    """A slice's chunks in float64, by kind."""
    found: dict[str, Tensor] = {}
    for kind, numel in part.chunks():
        data = blob.data[starts[kind] :]
        vector = data.view(torch.float32) if kind in ("gain", "bias") else data
        found[kind] = vector[:numel].double()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [DORA, LORA_BIAS, EVERYWHERE])
def test_an_adapted_linear_is_what_peft_says_it_is(
    fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """gain * (x W + b0) + scale * (x A) B' + bias = m / n * (x W + scale * (x A) B) + trained, n
    being the norms of W + scale * B A, and b0 in place of a bias that was not trained."""
    torch.manual_seed(0)
    write(tmp_path / "x", **fields)
    raw, blob = (blob_of(tmp_path, "x", dtype) for _ in range(2))
    folder = make_folder(BIASED)
    folder.fold(blob)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    for part, starts in raw.manifest.placed(raw.chunk_starts):
        site, linear = BIASED[part.site], folder._linears[part.site]
        first = site.slices[part.slice].out_offset
        rows = range(first, first + part.out_features)
        w_NK = torch.cat(list(linear.row_blocks(rows, 1000))).double()
        zeros_N = torch.zeros(len(rows), dtype=torch.float64)
        b0_N = zeros_N if linear.bias_N is None else linear.bias_N[rows.start : rows.stop].double()
        before, after = numbers(raw, part, starts), numbers(blob, part, starts)
        x_TK = torch.randn(5, site.in_features, dtype=torch.float64)
        delta_NK, delta_TN = torch.zeros_like(w_NK), torch.zeros(5, len(rows)).double()
        if part.rank:
            a_RK, b_RN = before["a"].view(part.rank, -1), before["b"].view(part.rank, -1)
            delta_NK = part.scale * b_RN.T @ a_RK
            delta_TN = part.scale * (x_TK @ a_RK.T) @ after["b"].view(part.rank, -1)
        factor_N: Tensor = zeros_N + 1
        if part.magnitude:
            factor_N = before["gain"] / (w_NK + delta_NK).norm(dim=1)
        bias_N = before.get("bias", zeros_N) + (b0_N if part.bias is None else 0)
        expected_TN = factor_N * (x_TK @ (w_NK + delta_NK).T) + bias_N
        gain_N, added_N = after.get("gain", zeros_N + 1), after.get("bias", zeros_N)
        actual_TN = gain_N * (x_TK @ w_NK.T + b0_N) + delta_TN + added_N
        scale = expected_TN.abs().max()
        assert (actual_TN - expected_TN).abs().max() < tolerance * scale
        if part.magnitude or part.bias:
            unfolded_TN = x_TK @ (w_NK + delta_NK).T + b0_N
            assert (unfolded_TN - expected_TN).abs().max() > 5 * tolerance * scale


def test_the_size_of_blocks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x", **DORA)
    whole, piecemeal = (blob_of(tmp_path, "x", torch.float32) for _ in range(2))
    make_folder(BIASED).fold(whole)
    monkeypatch.setattr(fold_module, "CPU_BLOCK_WEIGHTS", 40)
    make_folder(BIASED).fold(piecemeal)
    assert torch.allclose(whole.data, piecemeal.data, rtol=1e-6)


def test_others_get_the_cores_after_each_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(fold_module, "pause_between_pieces", pauses.append)
    monkeypatch.setattr(fold_module, "CPU_BLOCK_WEIGHTS", 16 * 4)
    write(tmp_path / "x", modules=("q_proj",), **DORA)
    make_folder(BIASED).fold(blob_of(tmp_path, "x", torch.float32))
    assert len(pauses) == 2 * 4, "two layers, four rows a block"
    assert all(pause >= 0 for pause in pauses)


def test_two_revisions_do_not_share_a_gain(tmp_path: Path) -> None:
    folder = make_folder(BIASED)
    for name, seed in (("x", 1), ("y", 2)):
        write(tmp_path / name, seed=seed, **DORA)
    first, second, again = (blob_of(tmp_path, name, torch.float32) for name in "xyx")
    for blob in (first, second, again):
        folder.fold(blob)
    assert torch.equal(first.data, again.data)
    assert not torch.equal(first.data, second.data)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _cancel_the_base(folder: BaseFolder) -> Callable[[Tensors], None]:
    """Row 0 of q_proj: B A takes all of W away."""

    def change(tensors: Tensors) -> None:
        (block_NK,) = folder._linears[0].row_blocks(range(1), 1000)
        a_RK, b_NR = tensors[f"{Q0}.lora_A.weight"], tensors[f"{Q0}.lora_B.weight"]
        a_RK[0], b_NR[0] = block_NK[0], 0
        b_NR[0, 0] = -0.5  # the scale is 2

    return change


def test_norms_of_zero_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(BIASED)
    write(tmp_path / "x", change=_cancel_the_base(folder), **DORA)
    with pytest.raises(AdapterInvalidError, match=r"q_proj\.lora_magnitude_vector.* not finite"):
        folder.fold(blob_of(tmp_path, "x", torch.float32))


def test_a_gain_too_large_for_float16_is_refused_there_only(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_magnitude_vector"].fill_(1e6)

    folder = make_folder(BIASED)
    write(tmp_path / "x", change=change, **DORA)
    folder.fold(blob_of(tmp_path, "x", torch.bfloat16))
    with pytest.raises(AdapterInvalidError, match=r"not finite in float16"):
        folder.fold(blob_of(tmp_path, "x", torch.float16))
