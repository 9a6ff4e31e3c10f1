#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, offline, with this machine's own torch and tools, in ten minutes
# at most: build, GPU tests beside memcheck, racecheck and synccheck, and then benchmarks alone.
#
#   bench/gpu.sh OUT     writes records with their provenance to the folder OUT
#
# Each part runs whatever became of the one before; the last line and the exit status tell.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
rm -f "$out/failed"
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
# The rows' commit: what runs is installed, and knows of no checkout.
export ADAMPROX_COMMIT=${ADAMPROX_COMMIT:-$(git describe --always --dirty)}

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "== $name: $((SECONDS - start)) s" >&2
  else
    echo "== $name: failed after $((SECONDS - start)) s" >&2
    echo "$name" >>"$out/failed"
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
  set -eo pipefail
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  nvcc --version | tail -n 2
  "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  echo "commit $ADAMPROX_COMMIT"
  date -u +%Y-%m-%d
}

gpu_tests() {
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n auto --maxprocesses 12 --dist worksteal)
  "$python" -m pytest $(grep -l 'mark\.gpu' tests/test_*.py) -q -p no:cacheprovider -p no:benchmark -m gpu \
    --maxfail=40 --tb=short "${workers[@]}"
}

sanitize() { # sanitize TOOL
  compute-sanitizer --tool "$1" --error-exitcode 1 --target-processes all \
    "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider -m gpu -k test_short_run
}

benchmark() {
  local dtype parts
  for dtype in float32 bfloat16_float32 bfloat16; do
    parts=(steps sizes)
    if [ $dtype = float32 ]; then
      parts+=(end-to-end)
      "$python" -c 'import matplotlib' 2>/dev/null && parts+=(picture)
    fi
    "$python" -m adamprox bench --device cuda --dtype $dtype --parts "${parts[@]}" --seconds 0.3 \
      --models '400 x 16' '465 groups' '10000 x 64' '1000 x 1024' 'ResNet-50' 'GPT-2 small' \
      '10 x 16 M' --backends cuda triton \
      --optimizers 'torch fused' AdamW AdamProxL2 'AdamProxL2, row' 'AdamProxL2, group' \
      'torch fused, captured' 'AdamW, captured' \
      --out "$out" || return
  done
}

export PYTHONPATH=$out/.site${PYTHONPATH:+:$PYTHONPATH}
export -f build provenance gpu_tests sanitize benchmark
export out python
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$out/.site"' EXIT
rm -rf "$out/.site"
part provenance 20 bash -c provenance
part build 130 bash -c build
if [ ! -d "$out/.site/adamprox" ]; then # or another adamprox would be tested
  echo "failed: $(tr '\n' ' ' <"$out/failed"); nothing else was run" >&2
  exit 1
fi
part tests 250 bash -c gpu_tests &
for tool in memcheck racecheck synccheck; do
  part $tool 250 bash -c "sanitize $tool" &
done
wait
part benchmark 140 bash -c benchmark
tail -n 5 "$out/tests.log" >&2
cd "$out" # few files, for who copies them
logs=({provenance,build,tests,memcheck,racecheck,synccheck,benchmark}.log)
tail -n +1 "${logs[@]}" >logs.txt && rm "${logs[@]}"
echo "failed: $(tr '\n' ' ' 2>/dev/null <"$out/failed" || echo none); records in $out"
[ ! -s "$out/failed" ]
