"""Compiles the CPU kernels now, so that no server's first start has to.

python -m lory_kernels

Without a compiler it says so and ends well: plain PyTorch computes instead. It must not know who
needs the kernels.
"""

import sys

from lory_kernels.build import compiled_library
from lory_kernels.contract import KernelUnavailableError


def main() -> None:
    try:
        lanes = compiled_library().lory_vector_lanes()
    except KernelUnavailableError as error:
        sys.stderr.write(f"CPU kernels: plain PyTorch computes instead, slower: {error}\n")
        return
    sys.stdout.write(f"CPU kernels: compiled, {lanes} numbers a vector\n")


if __name__ == "__main__":
    main()
