"""Others' kernels in the bench: who is absent is said, and foreign modules start alone."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernel_bench_cases import place
from lory_kernels.bench import peers as finding
from lory_kernels.bench.case import Contender, Place
from lory_kernels.bench.foreign import ForeignPackage
from lory_kernels.bench.peers import PEERS, Peer, find_peers
from lory_kernels.bench.sgmv import SgmvInputs

TRITON = "its kernels are Triton's, the backend is cpu"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What is imported here is not there for others."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("vllm", "sglang", "stranger"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (place("cpu"), TRITON),
        (place("triton", torch.float32), "weights of 16 bits"),
        (place("triton", torch.float16), "give --peers FOLDER"),
    ],
)
def test_without_a_folder_each_peer_is_said_absent(there: Place, reason: str) -> None:
    found = find_peers(None, there)
    assert found.sgmv == ()
    assert len(found.absent) == len(PEERS) == 2
    assert all(reason in line for line in found.absent)


def test_a_folder_without_their_packages_is_told(tmp_path: Path) -> None:
    found = find_peers(tmp_path, place("triton", torch.float16))
    assert [f"no {name} in {tmp_path}" in line for name, line in
            zip(("vllm", "sglang"), found.absent, strict=True)] == [True, True]  # fmt: skip


@pytest.mark.triton
def test_a_package_of_another_make_is_told_as_absent(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "vllm_src/vllm").mkdir(parents=True)
    (tmp_path / "sglang").mkdir()
    found = find_peers(tmp_path, place("triton", torch.float16))
    assert found.sgmv == ()
    assert "ModuleNotFoundError" in found.absent[0]
    assert "ModuleNotFoundError" in found.absent[1]


def test_a_peer_that_is_there_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    roots: list[Path] = []

    def load(root: Path, _place: Place) -> tuple[Contender[SgmvInputs], ...]:
        roots.append(root)
        return (Contender("one", "peer", lambda inputs: lambda: (inputs.y_TN,)),)

    def fail(_root: Path, _place: Place) -> tuple[Contender[SgmvInputs], ...]:
        raise AttributeError("lora_shrink moved")

    peers = (Peer("One", "one_src", "one", load), Peer("Two", "one_src", "one", fail))
    monkeypatch.setattr(finding, "PEERS", peers)
    monkeypatch.setattr(finding, "find_spec", lambda _name: None)
    found = find_peers(tmp_path, place("triton", torch.float16))
    assert [one.name for one in found.sgmv] == ["one"]
    assert roots == [tmp_path]
    assert found.absent == (
        "bitsandbytes' NF4 kernels: pip install bitsandbytes",
        "Two: AttributeError: lora_shrink moved",
    )


def test_a_foreign_module_runs_without_its_package(tmp_path: Path) -> None:
    folder = tmp_path / "stranger/deep"
    folder.mkdir(parents=True)
    for starting in (tmp_path / "stranger", folder):
        (starting / "__init__.py").write_text("raise RuntimeError('the engine starts')\n")
    (folder / "kernel.py").write_text("from stranger import envs\nDOUBLE = 2 * envs.SINGLE\n")
    package = ForeignPackage(tmp_path, "stranger")
    package.folders(["stranger.deep"])
    package.stand_in("stranger.envs", SINGLE=21)
    assert vars(package.module("stranger.deep.kernel"))["DOUBLE"] == 42
    ForeignPackage(tmp_path, "stranger")
    with pytest.raises(ImportError, match="was imported before"):
        ForeignPackage(tmp_path / "elsewhere", "stranger")
