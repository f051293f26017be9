"""What is made of turns of streams with and without a job beside them."""

import pytest
from benchmarks.training_beside import Progress, between, medians, ratios


def turn(tokens_per_s: float, p99: float) -> dict[str, object]:
    return {"tokens_per_s": tokens_per_s, "gap_s": {"p50": 0.001, "p99": p99}}


def test_streams_beside_a_job_are_compared_with_the_turns_around_them():
    """A machine that gets slower by the minute is not the job's doing."""
    training = {
        "alone": Progress(10.0, 100, 6000).since(Progress(5.0, 50, 1000)),
        "beside": Progress(20.0, 104, 6400).since(Progress(10.0, 100, 6000)),
    }
    alone = between(turn(1000.0, 0.004), turn(800.0, 0.006))
    found = ratios({"alone": alone, "beside": turn(810.0, 0.010), "training": training})
    assert found == pytest.approx(
        {
            "tokens_per_s_beside_to_alone": 0.9,
            "gap_p50_beside_to_alone": 1.0,
            "gap_p99_beside_to_alone": 2.0,
            "training_tokens_per_s_alone": 1000.0,
            "training_tokens_per_s_beside": 40.0,
            "training_steps_per_s_beside": 0.4,
        }
    )


def test_medians_are_of_the_ratios():
    training = {name: {"tokens_per_s": 1.0, "steps_per_s": 1.0} for name in ("alone", "beside")}
    every = [
        {"alone": turn(100.0, 1.0), "beside": turn(rate, 1.0), "training": training}
        for rate in (80.0, 95.0, 90.0)
    ]
    assert medians(every)["tokens_per_s_beside_to_alone"] == 0.9
