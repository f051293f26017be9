"""Others' kernels, run beside ours: found in a folder that the caller names, or said absent.

The folder holds published wheels unpacked, `vllm_src/vllm` and `sgl_src/sglang` or either package
by itself; nothing of them is part of this project. Checked with these:

    pip download --no-deps vllm==0.33.0 sglang==0.5.23
    unzip vllm-*.whl 'vllm/lora/*' -d FOLDER/vllm_src
    unzip sglang-*.whl 'sglang/kernels/ops/lora/*' 'sglang/srt/lora/*' -d FOLDER/sgl_src

It must not know how they compute.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from lory_kernels.bench import peer_sglang, peer_vllm
from lory_kernels.bench.case import Contender, Place
from lory_kernels.bench.sgmv import SgmvInputs


@dataclass(frozen=True, slots=True)
class Peers:
    sgmv: tuple[Contender[SgmvInputs], ...]
    absent: tuple[str, ...]
    """Who is not there, and what would bring them."""


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    unpacked: str
    """Folder of its unpacked wheel."""
    package: str
    load: Callable[[Path, Place], tuple[Contender[SgmvInputs], ...]]

    def root(self, folder: Path) -> Path:
        """The folder that holds the package."""
        for root in (folder / self.unpacked, folder):
            if (root / self.package).is_dir():
                return root
        raise FileNotFoundError(f"no {self.package} in {folder} or in its {self.unpacked}")


PEERS = (
    Peer("vLLM's lora_shrink and lora_expand", "vllm_src", "vllm", peer_vllm.load),
    Peer("SGLang's csgmv and triton_v2", "sgl_src", "sglang", peer_sglang.load),
)


def find_peers(folder: Path | None, place: Place) -> Peers:
    found: list[Contender[SgmvInputs]] = []
    absent = list(_absent_packages())
    for peer in PEERS:
        reason = _reason_against(folder, place)
        if folder is None or reason:
            absent.append(f"{peer.name}: {reason}")
            continue
        try:
            found += peer.load(peer.root(folder), place)
        except Exception as error:  # noqa: BLE001 - a peer of another version is told as absent
            absent.append(f"{peer.name}: {type(error).__name__}: {error}")
    return Peers(tuple(found), tuple(absent))


def _absent_packages() -> Iterator[str]:
    if find_spec("bitsandbytes") is None:
        yield "bitsandbytes' NF4 kernels: pip install bitsandbytes"


def _reason_against(folder: Path | None, place: Place) -> str:
    if place.backend != "triton":
        return f"its kernels are Triton's, the backend is {place.backend}"
    if place.dtype == torch.float32:
        return "it takes weights of 16 bits: choose --dtype bfloat16 or float16"
    if folder is None:
        return "give --peers FOLDER with its unpacked wheel"
    return ""
