"""The choice of an NF4 product's way: complete, reasoned, and what NF4Linear then does."""

import subprocess
import sys

import pytest
import torch

from lory_kernels import nf4_choice
from lory_kernels.nf4_choice import ANY_ROWS, GROUP, MAX_SPLITS, Choice, Tiles, choices_for, choose
from lory_server.model import nf4

H200 = ("NVIDIA H200", (9, 0))
SHAPES_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SHAPES = (*SHAPES_8B, (1152, 896), (9728, 896), (896, 4864), (130, 576), (40, 64), (57344, 8192))
"""(out features, in features)."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_every_number_of_rows_has_one_choice_with_a_reason(
    shape: tuple[int, int], capability: tuple[int, int]
) -> None:
    choices = choices_for("any", capability, *shape, 64)
    limits = [choice.max_rows for choice in choices]
    assert limits == sorted(set(limits))
    assert limits[-1] == ANY_ROWS
    for choice in choices:
        assert choice.reason.endswith(".")
        assert choose(choices, choice.max_rows) is choice
        assert choose(choices, 1) is choices[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_divide_the_work(shape: tuple[int, int]) -> None:
    for choice in choices_for(*H200, *shape, 64):
        tiles = choice.tiles
        if tiles is None:
            continue
        num_groups = shape[1] // GROUP
        assert num_groups % tiles.groups == 0
        assert 1 <= tiles.splits <= MAX_SPLITS
        assert tiles.splits == 1 or num_groups // (tiles.groups * tiles.splits) >= 4


@pytest.mark.parametrize("shape", SHAPES_8B)
def test_an_h200_has_a_program_or_two_for_each_processor(shape: tuple[int, int]) -> None:
    choices = choices_for(*H200, *shape, 64)
    assert [choose(choices, rows).path for rows in (1, 4, 5, 16, 256, 257)] == [
        "bitsandbytes", "bitsandbytes", "triton", "triton", "triton", "dequantize",
    ]  # fmt: skip
    for rows in (8, 16, 32, 64, 128, 256):
        tiles = choose(choices, rows).tiles
        assert tiles is not None
        assert tiles.rows * -(-rows // tiles.rows) < 2 * max(rows, 16)
        columns = -(-shape[0] // tiles.columns)
        assert 132 <= -(-rows // tiles.rows) * columns * tiles.splits <= 1024


def test_gpus_without_a_rule_leave_it_to_bitsandbytes() -> None:
    assert [choice.path for choice in choices_for("NVIDIA A100", (8, 0), 4096, 4096, 64)] == [
        "bitsandbytes"
    ]


@pytest.mark.parametrize(("block", "in_features"), [(32, 4096), (4096, 6144)])
def test_blocks_the_kernel_cannot_take_go_to_bitsandbytes(block: int, in_features: int) -> None:
    assert choices_for(*H200, 4096, in_features, block) == (nf4_choice.ODD_BLOCKS,)


def test_what_was_measured_on_a_gpu_wins_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(rows=16, columns=64, groups=2, warps=4, stages=3, splits=3)
    measured = (
        Choice(8, "triton", "3.1 us against 4.2 by bitsandbytes.", tiles),
        Choice(ANY_ROWS, "dequantize", "9 us against 10."),
    )
    monkeypatch.setattr(nf4_choice, "MEASURED", {"NVIDIA H200": {(4096, 4096): measured}})
    assert choices_for(*H200, 4096, 4096, 64) == measured
    assert choices_for(*H200, 4096, 4096, 32) == (nf4_choice.ODD_BLOCKS,)
    assert choices_for(*H200, 4096, 8192, 64) != measured
    assert choices_for("NVIDIA H100 PCIe", (9, 0), 4096, 4096, 64) != measured


def test_measured_entries_are_complete() -> None:
    for shapes in nf4_choice.MEASURED.values():
        for choices in shapes.values():
            limits = [choice.max_rows for choice in choices]
            assert limits == sorted(set(limits))
            assert limits[-1] == ANY_ROWS
            assert all(any(c.isdigit() for c in choice.reason) for choice in choices)


def test_tiles_go_with_triton_alone() -> None:
    with pytest.raises(ValueError, match="tiles: None"):
        Choice(8, "triton", "Forgotten.")
    with pytest.raises(ValueError, match="'dequantize'"):
        Choice(8, "dequantize", "Of no use.", Tiles(16, 64, 1, 4, 4))


def test_the_choice_needs_no_torch() -> None:
    """Loaded by its path: the package beside it imports torch."""
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('choice', {nf4_choice.__file__!r})\n"
        "sys.modules['choice'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert not {'torch', 'triton', 'lory_kernels'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def linear_of(choices: tuple[Choice, ...] | None) -> nf4.NF4Linear:
    generator = torch.Generator().manual_seed(0)
    weight = nf4.quantize(torch.randn(48, 128, generator=generator), "w", False)
    return nf4.NF4Linear(weight, torch.randn(48, generator=generator).half(), choices)


def test_a_linear_on_the_cpu_has_no_choices() -> None:
    assert linear_of(None).choices == ()


def test_a_linear_takes_the_way_of_its_rows_and_float32_that_of_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = Choice(2, "bitsandbytes", "Few."), Choice(ANY_ROWS, "dequantize", "Many.")
    taken: list[Choice] = []
    by_choice = nf4.NF4Linear.by_choice

    def noted(self: nf4.NF4Linear, x_TK: torch.Tensor, choice: Choice) -> torch.Tensor:
        taken.append(choice)
        return by_choice(self, x_TK, choice)

    monkeypatch.setattr(nf4.NF4Linear, "by_choice", noted)
    layer, plain = linear_of((few, many)), linear_of(None)
    for rows, expected in ((1, few), (2, few), (3, many), (300, many)):
        x_TK = torch.ones(rows, 128).half()
        assert torch.equal(layer(x_TK, None), plain(x_TK, None))
        assert taken.pop() is expected
    bare = nf4.NF4Linear(plain._weight, None, (many,))
    assert bare(torch.ones(3, 128), None).dtype == torch.float32
    assert not taken
