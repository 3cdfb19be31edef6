#!/usr/bin/env bash
# Build the wheels that a GPU machine without a package registry lacks into .whl/ (ignored by git): DeepSpeed, what it
# imports, and our packages. Run from the root of the checkout, on any machine with a registry:
#
#     bash benchmarks/gpu/prepare.sh [PYTHON_VERSION]    # of the GPU machine, 3.12 by default
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
target=${1:-3.12}
rm -rf .whl
mkdir .whl
version() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt | head -1; }

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
for name in pydantic pydantic-core annotated-types typing-inspection hjson; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$target" --implementation cp \
    "${platforms[@]}" -d .whl "$name==$(version "$name")"
done
# DeepSpeed publishes no wheels; without its operators it is pure Python
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel -q --no-deps -w .whl "deepspeed==$(version deepspeed)"
"$python" -m pip wheel -q --no-deps -w .whl ./packages/hatnet-core ./packages/hatnet-train

tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
wheels=$(du -cb .whl | tail -1 | cut -f1)
echo "working tree $((tree >> 20)) MiB, wheels $((wheels >> 20)) MiB"
[ $((tree + wheels)) -lt $((60 << 20)) ] || { echo "expected less than 60 MiB in all" >&2; exit 1; }
