#!/usr/bin/env bash
# Gathers what a GPU machine without network lacks: one that has Python 3.12, torch, Triton and
# transformers, but not Lory's other dependencies. Run it where there is a network; carry the folder.
#
#   benchmarks/gpu_site.sh [FOLDER]        default .gpu-site, about 30 MB, out of git
#   there: make gpu-check SECTION=parity
#
# Wheels are unpacked, not installed, without their own dependencies: the list names all of them.
set -euo pipefail

folder=${1:-.gpu-site}
python=${PYTHON:-python3}
packages=(
  bitsandbytes msgspec                                                       # the engine
  starlette uvicorn h11 httpx httpcore anyio sniffio idna certifi            # HTTP
  pydantic annotated-types typing-inspection typing-extensions prometheus-client
  typer click shellingham rich markdown-it-py mdurl pygments                 # the command
  peft accelerate psutil                                                     # the peer
  trl datasets dill multiprocess                                             # the trainer's peer
)

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

target=(--only-binary=:all: --no-deps --python-version 3.12 --implementation cp)
for glibc in 2_39 2_34 2_31 2_28 2_27 2_24 2_17; do
  target+=(--platform "manylinux_${glibc}_x86_64")
done
target+=(--platform manylinux2014_x86_64 --platform any)

download() {
  "$python" -m pip --disable-pip-version-check -q download "${target[@]}" -d "$wheels" "$@"
}

download "${packages[@]}"
# pydantic works with one version of its core alone, which it names.
core=$(unzip -p "$wheels"/pydantic-[0-9]*.whl '*/METADATA' |
  sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p' | head -n 1)
download "pydantic-core==$core"

mkdir -p "$folder"
for wheel in "$wheels"/*.whl; do
  unzip -qo "$wheel" -d "$folder"
done
# bitsandbytes carries a library for each CUDA; torch 2.11 comes with 13.0.
find "$folder/bitsandbytes" -name 'libbitsandbytes_*' ! -name '*cuda130*' ! -name '*cpu*' -delete
du -sh "$folder"
