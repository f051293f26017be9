"""A thousand adapters of the 8B shape from few files, in memory: 84 GB of them cannot be written.

Names share files of weights, by hard links; each has a configuration of its own, with a scale of
its own. So each is another adapter to the server, which reads, checks and decodes it like any, and
each has host memory of its own; but numbers repeat, every so many names. It must not know how
adapters are served.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.crowd import CONFIG, WEIGHTS
from benchmarks.models import Shape, adapter_config, adapter_tensors

IN_MEMORY = Path("/dev/shm")
SPARE = 1.5
"""So many times what is written must be free."""


@dataclass(frozen=True)
class Kin:
    """Adapters of one rank on all seven projections."""

    shape: Shape
    rank: int
    count: int
    files: int
    """Of weights; names take them in turn."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"r{self.rank}-{number:05d}" for number in range(self.count))

    @property
    def adapter_bytes(self) -> int:
        """Of one, in 16 bits."""
        return 2 * self.rank * sum(out + into for _, out, into in self.shape.modules)

    @property
    def file_bytes(self) -> int:
        return min(self.files, self.count) * self.adapter_bytes

    def write(self, folder: Path) -> None:
        files = [folder / f".weights-r{self.rank}-{number}" for number in range(self.files)]
        for number, file in enumerate(files[: self.count]):
            tensors = adapter_tensors(self.shape, self.rank, seed=1000 * self.rank + number)
            save_file(tensors, file, metadata={"format": "pt"})
        for number, name in enumerate(self.names):
            (folder / name).mkdir()
            os.link(files[number % self.files], folder / name / WEIGHTS)
            (folder / name / CONFIG).write_text(json.dumps(self._config(number)))

    def _config(self, number: int) -> dict[str, object]:
        """A scale between 1 and 2, which no other name has."""
        alpha = self.rank * (1 + number / self.count)
        named = {"base_model_name_or_path": "", "lora_alpha": alpha}
        return adapter_config(self.shape, self.rank) | named


@contextmanager
def written(kin: tuple[Kin, ...], parent: Path | None = None) -> Iterator[Path]:
    """A folder with all of them, in memory where there is room, as long as the block lasts."""
    parent = parent or roomy(sum(one.file_bytes for one in kin))
    folder = Path(tempfile.mkdtemp(prefix="lory-kin-", dir=parent))
    try:
        for one in kin:
            one.write(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def roomy(num_bytes: int) -> Path:
    """The file system in memory, or where temporary files go if that is too small."""
    if IN_MEMORY.is_dir() and os.access(IN_MEMORY, os.W_OK):
        status = os.statvfs(IN_MEMORY)
        if status.f_bavail * status.f_frsize >= SPARE * num_bytes:
            return IN_MEMORY
    return Path(tempfile.gettempdir())
