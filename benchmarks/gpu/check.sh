#!/usr/bin/env bash
# Measure on a GPU, from the root of a copy of the checkout:
#
#     bash benchmarks/gpu/check.sh [STAGE...]    # correctness, throughput, kernels, training_runs; all by default
#     HATNET_GPU_DRY=1 bash benchmarks/gpu/check.sh    # the same on a CPU, tiny, to try the scripts
#
# Results go to $OUT (gpu-out by default). SECONDS_LEFT bounds the whole (540 by default); stages run one after the
# other, since most are timed, and what has no time left is skipped and reported.
set -u
cd "$(dirname "$0")/../.."
export OUT=${OUT:-gpu-out} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2
export TORCHINDUCTOR_COMPILE_THREADS=2
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log.txt") 2>&1
python=${PYTHON:-python3}
dry=${HATNET_GPU_DRY:-}
if [ -z "$dry" ] && compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target .site .whl/*.whl || exit 1
fi
export PYTHONPATH=$PWD/packages/hatnet-core/src:$PWD/packages/hatnet-train/src:$PWD/.site${PYTHONPATH:+:$PYTHONPATH}
limit=${SECONDS_LEFT:-540}
[ -n "$dry" ] && limit=36000

if [ -z "$dry" ]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,clocks.mem --format=csv
  lscpu | grep -E "Model name|^CPU\(s\)"
fi
"$python" -c 'import torch, triton; print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)'

failed=0
stages=("$@")
[ $# -eq 0 ] && stages=(correctness throughput kernels training_runs)
for stage in "${stages[@]}"; do
  left=$((limit - SECONDS))
  # what follows throughput needs its share
  [ "$stage" = throughput ] && [ "$stage" != "${stages[-1]}" ] && left=$((left - 170))
  if [ "$left" -lt 30 ]; then echo "== $stage skipped: $left s left"; failed=1; continue; fi
  arguments=()
  [ "$stage" = throughput ] && arguments=(--seconds "$left")
  [ "$stage" = training_runs ] && arguments=("$((left - 10))")
  echo "== $stage (at $SECONDS s)"
  timeout -k 5 "$left" "$python" "benchmarks/gpu/$stage.py" "${arguments[@]}" || { echo "== $stage: status $?"; failed=1; }
done
echo "== done after $SECONDS s"
exit $failed
