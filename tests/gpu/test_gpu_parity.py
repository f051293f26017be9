"""Every GPU path against the CPU reference: the checks of `make gpu-check SECTION=parity`."""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_parity, gpu_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.fixture(scope="module")
def scope() -> gpu_parity.Scope:
    return gpu_parity.Scope(torch.device("cuda"), is_tiny=False)


def assert_all_pass(checks) -> None:
    found = list(checks)
    assert found
    failed = [check for check in found if not check.passed]
    assert not failed, failed


def test_sgmv_in_triton_equals_the_reference(scope: gpu_parity.Scope) -> None:
    assert_all_pass(gpu_parity.sgmv_checks(scope))


def test_nf4_linears_equal_their_decoded_weights(scope: gpu_parity.Scope) -> None:
    assert_all_pass(gpu_parity.nf4_checks(scope))


@pytest.mark.parametrize("family", sorted(gpu_world.FAMILIES))
def test_log_probabilities_are_those_of_the_cpu(scope: gpu_parity.Scope, family: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = gpu_world.make_world(family, Path(folder))
        assert_all_pass(gpu_parity.logprob_checks(scope, family, world))


@pytest.mark.parametrize("family", sorted(gpu_world.FAMILIES))
def test_decode_steps_are_those_of_the_cpu(scope: gpu_parity.Scope, family: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = gpu_world.make_world(family, Path(folder))
        assert_all_pass(gpu_parity.decode_checks(scope, family, world))


def test_answers_do_not_depend_on_eviction_preemption_or_pipelining(
    scope: gpu_parity.Scope,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = gpu_world.make_world("llama", Path(folder))
        assert_all_pass(gpu_parity.engine_checks(scope, world))
