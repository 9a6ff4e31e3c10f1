#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, offline, with this machine's own torch and tools, in ten minutes
# at most: build, GPU tests, memcheck, racecheck and synccheck, benchmarks.
#
#   bench/gpu.sh OUT     writes records with their provenance to the folder OUT
#
# Each part runs whatever became of the one before; the last line and the exit status tell.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name" >&2
  if ! timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    failed+=("$name")
    tail -n 25 "$out/$name.log" >&2
  fi
}

build() {
  # A build with a folder of its own on the path: nothing of the machine's environment changes.
  "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
    --target "$out/.site" . &&
    "$python" -m adamprox info --json >"$out/info.json"
}

provenance() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git describe --always --dirty
  date -u +%Y-%m-%d
}

sanitize() { # sanitize TOOL
  compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all \
    "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider -k test_short_run
}

benchmark() {
  local dtype
  for dtype in float32 bfloat16 bfloat16_float32; do
    # What else it can do takes packages that a GPU's machine may lack.
    "$python" -m adamprox bench --device cuda --dtype "$dtype" --parts steps sizes end-to-end \
      --seconds 1 --out "$out" --json || return
  done
}

export PYTHONPATH=$out/.site${PYTHONPATH:+:$PYTHONPATH}
export -f build provenance sanitize benchmark
export out python
part provenance 30 bash -c provenance
part build 170 bash -c build
part tests 150 "$python" -m pytest tests -q -p no:cacheprovider -m gpu
part memcheck 50 bash -c 'sanitize memcheck'
part racecheck 60 bash -c 'sanitize racecheck'
part synccheck 40 bash -c 'sanitize synccheck'
part benchmark 100 bash -c benchmark
rm -rf "$out/.site"
tail -n 5 "$out/tests.log" >&2
echo "failed: ${failed[*]:-none}; records in $out"
[ ${#failed[@]} -eq 0 ]
