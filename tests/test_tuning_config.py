"""The flags of fine-tuning jobs: each reaches the jobs, each wrong one is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from lory_router.config import ConfigError, ServeConfig, StartError, training_environment


def config(folder: Path, **flags: Any) -> ServeConfig:
    adapters = folder / "adapters"
    adapters.mkdir(exist_ok=True)
    mine = {"adapters": str(adapters), "fine_tuning": str(folder / "jobs")}
    return ServeConfig.from_flags({"model": "org/base"} | mine | flags)


def test_what_is_asked_for_reaches_the_jobs(tmp_path: Path):
    flags = {"tuning_device": "cuda:2", "tuning_share": 0.25, "tuning_memory": 4096}
    flags |= {"tuning_keep_jobs": 7, "tuning_keep_days": 30}
    settings = config(tmp_path, **flags).tuning_settings
    assert settings is not None
    assert (settings.device, settings.gpu, settings.share) == ("cuda", "2", 0.25)
    assert settings.max_memory_bytes == 4096
    assert (settings.keep_jobs, settings.keep_days) == (7, 30)
    usual = config(tmp_path).tuning_settings
    assert usual is not None
    assert (usual.device, usual.gpu, usual.share, usual.max_memory_bytes) == ("cpu", "", 0.1, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tuning_share": 1.5}, "--tuning-share: 1.5 is too large; at most 1"),
        ({"tuning_keep_jobs": 0}, "--tuning-keep-jobs: 0 is too small; at least 1"),
        ({"tuning_share": -0.1}, "--tuning-share: -0.1 is too small"),
        ({"tuning_share": 0.5, "fine_tuning": ""}, "--tuning-share: needs --fine-tuning"),
        ({"tuning_device": "cuda:"}, "--tuning-device: 'cuda:' is none"),
        ({"tuning_device": "gpu"}, "--tuning-device: 'gpu' is none; give cpu, cuda"),
    ],
)
def test_a_wrong_one_is_refused_by_name(tmp_path: Path, flags: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as told:
        config(tmp_path, **flags)
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(
    ("seen", "gpu", "expected"),
    [
        (None, "", None),
        (None, "1", "1"),
        ("4,5,6", "1", "5"),
        ("GPU-aa,GPU-bb", "0", "GPU-aa"),
        ("4,5", "", "4,5"),
    ],
)
def test_a_job_sees_the_gpu_that_is_named_of_those_the_server_sees(
    monkeypatch: pytest.MonkeyPatch, seen: str | None, gpu: str, expected: str | None
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    found = training_environment(3, gpu)
    assert found.get("CUDA_VISIBLE_DEVICES") == expected
    assert found["OMP_NUM_THREADS"] == "3"


def test_a_gpu_that_the_server_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(StartError, match="there is no cuda:1 in CUDA_VISIBLE_DEVICES=0"):
        training_environment(1, "1")
