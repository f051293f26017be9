"""The settings of fine-tuning jobs, as flags; see docs/fine-tuning-api.md.

It must not know how a job is carried out.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from lory_router.flags import flag, size_flag
from lory_router.tuning.settings import TuningSettings
from lory_server.messages import Quantization

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True)
class TuningConfig:
    """Training beside serving."""

    fine_tuning: str = flag(
        "", "Folder of fine-tuning jobs and their files; empty: /v1/fine_tuning is not served."
    )
    tuning_device: str = flag(
        "cpu",
        "Where jobs train: cpu, cuda (needs memory that --memory leaves to them), or a GPU of"
        " their own such as cuda:1.",
    )
    tuning_threads: int = flag(1, "CPU threads of a job.", at_least=1)
    tuning_share: float = flag(
        0.1,
        "Part of the time that a job may run while requests run, and the most they lose to it.",
        at_least=0.0,
        at_most=1.0,
    )
    tuning_memory: int = size_flag(
        0, "Memory of the host at which a job is ended; 0: 3/4 of what is free as it begins."
    )
    tuning_max_file: int = size_flag(512 * 2**20, "Largest file that is taken for training.")
    tuning_files: int = size_flag(20 * 2**30, "Most bytes of all such files together.")
    max_tuning_jobs: int = flag(
        100, "Most jobs waiting, running or paused; one more is refused with 429.", at_least=1
    )
    tenant_tuning_jobs: int = flag(0, "The same of each tenant; 0: no further limit.", at_least=0)
    tenant_tuning_files: int = size_flag(
        0, "Most bytes of each tenant's files together; 0: no further limit."
    )

    tuning_keep_jobs: int = flag(
        1000, "Jobs of each tenant whose records stay once they are over.", at_least=1
    )
    tuning_keep_days: int = flag(
        0, "Days for which they stay at most; 0: no further limit.", at_least=0
    )

    def settings(
        self,
        model: str,
        model_names: tuple[str, ...],
        adapters: str,
        quantize: Quantization,
        *,
        double_quant: bool,
    ) -> TuningSettings | None:
        """What jobs are done with; None without a folder."""
        if not self.fine_tuning:
            return None
        local = Path(model)
        return TuningSettings(
            folder=Path(self.fine_tuning).absolute(),
            adapters=Path(adapters).absolute(),
            base=str(local.absolute()) if local.is_dir() else model,
            model_names=model_names,
            quantize=quantize,
            double_quant=double_quant,
            device="cpu" if self.tuning_device == "cpu" else "cuda",
            gpu=self.tuning_device.partition(":")[2],
            threads=self.tuning_threads,
            share=self.tuning_share,
            max_memory_bytes=self.tuning_memory,
            max_file_bytes=self.tuning_max_file,
            max_files_bytes=self.tuning_files,
            max_jobs=self.max_tuning_jobs,
            max_jobs_per_tenant=self.tenant_tuning_jobs,
            max_files_bytes_per_tenant=self.tenant_tuning_files,
            keep_jobs=self.tuning_keep_jobs,
            keep_days=self.tuning_keep_days,
        )

    def check(self, adapters: str) -> None:
        """Raises ValueError naming the flag; `adapters` is the folder that is served."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if changed and not self.fine_tuning:
            raise ValueError(f"--{changed[0].replace('_', '-')}: needs --fine-tuning FOLDER")
        if self.fine_tuning and not adapters:
            raise ValueError("--fine-tuning: needs --adapters, the folder where new ones go")
        if self.fine_tuning and _lies_in(Path(self.fine_tuning), Path(adapters)):
            raise ValueError("--fine-tuning: must not lie in --adapters, nor the other way")
        if not _DEVICE.fullmatch(self.tuning_device):
            raise ValueError(
                f"--tuning-device: {self.tuning_device!r} is none; give cpu, cuda, or cuda:1"
            )
        for name in ("tuning_max_file", "tuning_files"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')}: must be more than 0")


def _lies_in(one: Path, other: Path) -> bool:
    first, second = one.resolve(), other.resolve()
    return first == second or first in second.parents or second in first.parents
