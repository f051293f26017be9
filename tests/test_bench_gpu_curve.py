"""The curve on a GPU, as a dry run: the real engine on a tiny base, on the CPU."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_check, gpu_curve, gpu_report
from benchmarks.deadline import Deadline
from benchmarks.engine_drive import Driver, Request
from benchmarks.gpu_adapters import Kin, roomy, written
from benchmarks.gpu_base import llama_8b, tiny_llama
from benchmarks.gpu_curve import FULL, TINY, Point, Wishes

from lory_server.adapters.copier import HostCopier
from lory_server.model.decoder import Decoder

CPU = torch.device("cpu")
QUICK = replace(TINY, readers=0)
"""Without a process to start, which imports torch."""
ALONE = replace(QUICK, other_ranks=())
PRICE = Wishes(4.0)


@contextmanager
def engine(scale: gpu_curve.Scale, tmp_path: Path) -> Iterator[Driver]:
    with (
        written((scale.kin, *scale.others), tmp_path) as folder,
        gpu_curve.built(scale, CPU, PRICE, folder) as (driver, _),
    ):
        yield driver


def measured(scale: gpu_curve.Scale, wishes: Wishes, budget_s: float = 60.0) -> dict[str, Any]:
    deadline = Deadline.within(budget_s)
    return gpu_curve.measure(scale, CPU, wishes, deadline, lambda _: None, lambda _: None)


@pytest.mark.parametrize("readers", [0, pytest.param(1, marks=pytest.mark.full)])
def test_the_curve_is_what_the_engine_does(
    readers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Forward passes and copies are counted beneath it."""
    monkeypatch.setattr(gpu_curve, "TINY", replace(TINY, readers=readers))
    calls = {"hidden": 0, "copy": 0}
    hidden, copy = Decoder.hidden, HostCopier.copy

    def counted_hidden(self: Decoder, *args: Any) -> Any:
        calls["hidden"] += 1
        return hidden(self, *args)

    def counted_copy(self: HostCopier, *args: Any) -> Any:
        calls["copy"] += 1
        return copy(self, *args)

    monkeypatch.setattr(Decoder, "hidden", counted_hidden)
    monkeypatch.setattr(HostCopier, "copy", counted_copy)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["curve", "--device", "cpu", "--tiny", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["curve"]
    _check_held(found["held"])
    _check_points(found)
    _check_copies(found)
    assert found["not_reached"] == []
    runs = [run for point in found["points"] for run in point["runs"]]
    tokens = sum(run["output_tokens_per_s"] * run["wall_s"] for run in runs)
    assert calls["hidden"] > tokens / TINY.rows
    assert calls["copy"] >= sum(run["copies"] for run in runs) + found["overlap"]["copies"]
    assert "16 of 16 adapters are in host memory" in capsys.readouterr().out
    assert "| uniform | 16 | " in gpu_report.curve_table(tmp_path)
    assert "While copies go on" in gpu_report.copies_tables(tmp_path)
    assert gpu_report.chart(tmp_path) is not None


def _check_held(held: dict[str, Any]) -> None:
    assert (held["adapters"], held["wanted"], held["loads"]) == (16, 16, 18)
    assert held["shared"] == 0
    assert held["host_bytes"] == 16 * TINY.kin.adapter_bytes + 2 * TINY.others[0].adapter_bytes
    assert held["why_no_more"] == ""


def _check_points(found: dict[str, Any]) -> None:
    points = {(point["popularity"], point["count"]): point for point in found["points"]}
    assert set(points) == {(kind, n) for kind in TINY.popularities for n in TINY.counts}
    for point in points.values():
        assert len(point["runs"]) == TINY.passes
        assert point["output_tokens_per_s"] > 0
        assert 0 < point["ttft_p50_s"] <= point["ttft_p99_s"]
        assert 0 < point["tpot_p50_s"] <= point["tpot_p99_s"]
        assert 0 < point["rows_a_step"] <= TINY.rows
        dedicated = point["cost_per_million_dedicated"] / point["count"]
        assert dedicated == pytest.approx(point["cost_per_million"], rel=1e-3)
    cost = 4.0 / 3600 / points["uniform", 16]["output_tokens_per_s"] * 1e6
    assert points["uniform", 16]["cost_per_million"] == pytest.approx(cost, rel=1e-3)
    copies = {key: sum(run["copies"] for run in point["runs"]) for key, point in points.items()}
    assert copies["uniform", 16] > copies["uniform", 2], "16 do not fit the pool of 5, 2 do"


def _check_copies(found: dict[str, Any]) -> None:
    assert [one["rank"] for one in found["loads"]] == [2, 4]
    small, large = found["loads"]
    assert large["device_bytes"] > small["device_bytes"] > 0
    assert all(min(one["to_device_ms"], one["pinned_ms"]) > 0 for one in found["loads"])
    assert [one["rank"] for one in found["first_tokens"]] == [2, 4]
    assert all(min(one["host_ms"], one["device_ms"]) > 0 for one in found["first_tokens"])
    overlap = found["overlap"]
    assert (overlap["rows"], overlap["quiet"]["steps"]) == (2, 8)
    assert overlap["copies"] > 0
    assert overlap["copied_bytes_per_s"] > 0
    assert 0 <= overlap["idle_share"] < 1


def test_names_that_share_memory_fail_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same configuration and weights are one revision, in memory once."""
    config = Kin._config
    monkeypatch.setattr(Kin, "_config", lambda self, _number: config(self, 0))
    found = measured(replace(ALONE, counts=(4,), passes=1), PRICE)
    assert found["held"]["shared"] == 2, "4 names over 2 files"
    assert found["points"]
    assert not found["passed"]


def test_as_many_adapters_are_held_as_there_is_room_for_and_that_is_said() -> None:
    room = 5 * TINY.kin.adapter_bytes
    found = measured(replace(ALONE, passes=1), Wishes(1.0, host_bytes=room))
    assert found["held"]["adapters"] == 5
    assert "GiB were allowed" in found["held"]["why_no_more"]
    assert {point["count"] for point in found["points"]} == {2, 5}
    assert found["passed"]


def test_free_memory_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    one, before = ALONE.kin.adapter_bytes, [100]

    def free_bytes() -> int:
        """Each look finds room for one adapter less."""
        before[0] -= 1
        return before[0] * one

    monkeypatch.setattr(gpu_curve, "free_host_bytes", free_bytes)
    few = replace(ALONE, counts=(2, 200), passes=1, host_reserve_bytes=80 * one)
    found = measured(few, PRICE)
    # An eighth of 99 is left alone, and each that is on its way counts.
    assert 80 <= found["held"]["adapters"] <= 88
    assert found["held"]["why_no_more"].startswith("free host memory ran out")
    assert {point["count"] for point in found["points"]} == {2, found["held"]["adapters"]}


def test_without_any_room_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_curve, "free_host_bytes", lambda: 0)
    found = measured(replace(ALONE, passes=1), PRICE)
    assert found["held"]["adapters"] == 0
    assert found["points"] == []
    assert not found["passed"]


def test_what_time_does_not_reach_is_named() -> None:
    found = measured(ALONE, PRICE, budget_s=0.0)
    assert found["points"] == []
    assert "the time for it was over" in found["held"]["why_no_more"]
    assert not found["passed"]


def test_points_that_time_does_not_reach_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    over = Deadline.within(0.0)

    def filled(*_: object) -> tuple[list[Any], dict[str, Any]]:
        arrived = [gpu_curve.Arrived(name, TINY.rank, name) for name in ALONE.kin.names]
        held = {"adapters": 16, "wanted": 16, "host_bytes": 1, "bytes_per_s": 1}
        return arrived, held | {"shared": 0, "why_no_more": ""}

    monkeypatch.setattr(gpu_curve, "fill", filled)
    found = gpu_curve.measure(
        ALONE, CPU, PRICE, over, lambda f: kept.append(str(f)), lambda _: None
    )
    points = [str(Point(kind, n)) for n in ALONE.counts for kind in ALONE.popularities]
    assert found["not_reached"][: len(points)] == points
    assert found["not_reached"][len(points) :] == ["loads", "first_tokens", "overlap"]
    assert kept, "what there was before is kept"


def test_what_was_found_is_kept_if_the_rest_never_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is taken away: KeyboardInterrupt stands for it."""
    run = gpu_curve.Curve.run

    def one_run(curve: gpu_curve.Curve, point: Point, number: int) -> dict[str, Any]:
        if curve.found["points"]:
            raise KeyboardInterrupt
        return run(curve, point, number)

    monkeypatch.setattr(gpu_curve.Curve, "run", one_run)
    monkeypatch.setattr(gpu_curve, "TINY", ALONE)
    out = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["curve", "--device", "cpu", "--tiny", "--out", str(out)])
    found = json.loads(out.read_text())["curve"]
    assert len(found["points"]) == 1
    assert (found["is_whole"], found["passed"]) == (False, False)


def test_a_request_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    with engine(ALONE, tmp_path) as driver, pytest.raises(RuntimeError, match="no adapter"):
        driver.answer([Request("nobody", (3, 4), 2)])


def test_each_adapter_answers_in_its_own_way(tmp_path: Path) -> None:
    """Names over one file of weights have scales of their own: the engine keeps them apart."""
    with engine(ALONE, tmp_path) as driver:
        names = ALONE.kin.names
        replies = driver.answer([Request(name, (3, 4, 5), 2) for name in names])
        finished = [reply.finished for reply in replies]
        revisions = {one.adapter_revision for one in finished if one is not None}
    assert len(revisions) == len(names)
    assert all(reply.tokens == 2 for reply in replies)
    assert all(reply.sent_s < reply.first_s <= reply.last_s for reply in replies)


def test_names_over_few_files_take_little_room(tmp_path: Path) -> None:
    kin = Kin(TINY.shape, 4, 6, 2)
    with written((kin,), tmp_path) as folder:
        weights = [folder / name / "adapter_model.safetensors" for name in kin.names]
        assert len({path.stat().st_ino for path in weights}) == 2
        configs = {(folder / name / "adapter_config.json").read_text() for name in kin.names}
        assert len(configs) == 6
    assert not list(tmp_path.iterdir())


def test_where_memory_is_too_small_files_go_to_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert roomy(1 << 60) != Path("/dev/shm")


def test_a_thousand_adapters_of_the_8b_shape_are_84_gb() -> None:
    assert FULL.kin.count == 1000
    assert FULL.kin.count * FULL.kin.adapter_bytes == pytest.approx(84e9, rel=0.01)
    assert sum(one.file_bytes for one in (FULL.kin, *FULL.others)) < 1e9
    assert set(FULL.counts) == {1, 5, 32, 100, 500, 1000}
    assert FULL.copies.rows + 3 <= FULL.resident


@pytest.mark.parametrize(("scale", "spec"), [(FULL, llama_8b()), (TINY, tiny_llama())])
def test_adapters_are_made_for_the_base_that_is_made(scale: gpu_curve.Scale, spec: Any) -> None:
    assert scale.spec == spec
    modules = {part.module: site for site in spec.sites() for part in site.slices}
    for module, out_features, in_features in scale.shape.modules:
        site = modules.pop(module)
        assert in_features == site.in_features
        assert out_features in [part.out_features for part in site.slices]
    assert not modules
