"""The kernel bench on a GPU: how it times, and that a contender that fails stops no other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lory_kernels.bench.case import Case, Contender, Place, Run
from lory_kernels.bench.clock import CudaClock, Effort
from lory_kernels.bench.limits import Limits
from lory_kernels.bench.linears import dense_case
from lory_kernels.bench.measure import measure
from lory_kernels.bench.shapes import LinearShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

LIMITS = Limits(4e12, 4e12, 8e14)
QUICK = Effort(seconds=0.01)


@pytest.fixture
def clock() -> CudaClock:
    return CudaClock(QUICK, torch.device("cuda"))


@pytest.fixture
def case() -> Case:
    place = Place.at("triton", torch.device("cuda"), torch.bfloat16)
    return dense_case(place, LinearShape("o", 4096, (4096,)), 8)


def test_a_call_is_timed_from_a_graph_cold_and_warm(case: Case, clock: CudaClock) -> None:
    timing = measure(case, LIMITS, clock).findings[0].timing
    assert timing is not None
    assert timing.is_captured
    assert timing.cold is not None
    assert 1e-6 < timing.warm.median_s < timing.cold.median_s < 1e-2


def test_a_call_that_waits_for_the_device_fails_alone(case: Case, clock: CudaClock) -> None:
    """A graph cannot hold it; told so, it is timed without one."""
    right = case.contenders[0]

    def waiting(inputs: object) -> Run:
        run = right.prepare(inputs)

        def run_and_wait() -> tuple[Tensor, ...]:
            torch.cuda.synchronize()
            return run()

        return run_and_wait

    waits = Contender("waits", "peer", waiting)
    told = replace(waits, name="told", can_capture=False)
    found = measure(replace(case, contenders=(waits, right, told)), LIMITS, clock).findings
    assert [one.status for one in found] == ["failed", "right", "right"]
    assert [one.timing.is_captured for one in found if one.timing] == [True, False]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
