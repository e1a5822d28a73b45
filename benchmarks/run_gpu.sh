#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command and under nine minutes: build, test, measure, and print the tables.
#
#   benchmarks/run_gpu.sh [--dry-run] [STAGE...]
#   stages: build tests micro kernels e2e ranking sanitizer prune dispatch compiled
#
# Without stages all run, the most telling first; each under a limit of its own and what is left of SECONDS_IN_ALL.
# One that fails does not stop the next ones, but the exit status tells. The end of what each prints is shown; files go
# to $OUT (benchmarks/results): gpu-STAGE-DEVICE.json for what is measured, gpu-run.log for everything else. --dry-run
# tries the measuring stages on small shapes, without a GPU too. In a checkout without .git, BENCH_COMMIT names the
# commit; PYTHON, if set, is run instead of python3.
set -euo pipefail
[ -z "${OUT:-}" ] || OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/.."

out=${OUT:-$PWD/benchmarks/results}
mkdir -p "$out"
log=$out/gpu-run.log
deadline=$((SECONDS + ${SECONDS_IN_ALL:-530}))
python=${PYTHON:-$(command -v python3)}
sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer || true)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

declare -A limit=([build]=100 [tests]=130 [micro]=35 [kernels]=110 [e2e]=100 [ranking]=40 [sanitizer]=80 [prune]=110 [dispatch]=60 [compiled]=180)
stages=(build tests micro kernels e2e ranking sanitizer prune dispatch compiled)

# Only for this machine's GPU, with every kernel's registers and spills in the log.
build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  MOSAIC_CUDA=on MOSAIC_CUDA_ARCHS=${MOSAIC_CUDA_ARCHS:-$capability} NVCC_APPEND_FLAGS=-Xptxas=-v \
    "$python" -m pip --disable-pip-version-check install -v --no-build-isolation --no-deps -e .
  echo "$(grep -c 'Used .* registers' "$log") kernels, spills: $(grep -cE '[1-9][0-9]* bytes spill' "$log" || true)"
  "$python" -m mosaic_kernels.info
}

has() { "$python" -c "import $1" 2>/dev/null; }

# Side by side where pytest-xdist is: compiling and the CPU's part of the runs take longer than the GPU's. A kernel that
# never ends then costs its process alone, and pytest-timeout names the test. What is interrupted says what has failed.
tests() {  # SECONDS; a warning of a newer library must not cost a test here
  local which="cuda and not slow" options=(-q -W default -p no:cacheprovider) files
  if has xdist; then which=cuda options+=(-n 12); fi
  if has pytest_timeout; then options+=(--timeout 75 --timeout-method thread); fi
  mapfile -t files < <(grep -l 'mark\.cuda' tests/test_*.py)
  timeout --foreground --signal=INT --kill-after=10 "$(($1 * 4 / 5))" \
    "$python" -m pytest "${options[@]}" -m "$which" "${files[@]}"
}

# Without torch's caching allocator every tensor is an allocation of its own, so that an access past its end is seen.
sanitize() {  # TOOL SECONDS
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=3 "$2" \
    "$sanitizer" --tool "$1" --kernel-name kns=mosaic --error-exitcode 9 \
    "$python" -m pytest -q -x -W default -p no:cacheprovider -m cuda tests/test_cuda*.py \
    -k "${SANITIZE:-bfloat16 and not (triton or graph or determin or 4096 or 11008)}" >"$parts/$1" 2>&1
}

sanitizer() {  # SECONDS; its tools side by side: they wait for the processor most of the time
  [ -n "$sanitizer" ] || { echo "compute-sanitizer was not found: skipped"; return 0; }
  local tool status=0 code found=()
  local -A running=()
  parts=$(mktemp -d)
  for tool in memcheck racecheck synccheck; do sanitize "$tool" "$(($1 * 4 / 5))" & running[$tool]=$!; done
  for tool in "${!running[@]}"; do
    code=0
    wait "${running[$tool]}" || code=$?
    [ "$code" = 0 ] || status=1
    cat "$parts/$tool"
    found+=("$tool: $(grep -a SUMMARY "$parts/$tool" | tail -1) $(tail -1 "$parts/$tool"), exit status $code")
  done
  printf '%s\n' "${found[@]}"
  return "$status"
}

measure() {  # STAGE SECONDS: it starts nothing new in the last fifth, and has that to end
  "$python" benchmarks/gpu "$1" "${dry[@]}" --output "$out" --seconds "$(($2 * 4 / 5))"
}

run_stage() {  # STAGE SECONDS
  case $1 in
    build | tests | sanitizer) if [ ${#dry[@]} -gt 0 ]; then echo "skipped: dry run"; else "$1" "$2"; fi ;;
    *) measure "$1" "$2" ;;
  esac
}

dry=()
if [ "${1:-}" = --dry-run ]; then dry=(--dry-run); shift; fi
if [ -n "${RUN_STAGE:-}" ]; then run_stage "$RUN_STAGE" "$1"; exit; fi  # this script again, below
[ $# -eq 0 ] || stages=("$@")
for stage in "${stages[@]}"; do
  [ -n "${limit[$stage]:-}" ] || { echo "no stage $stage; there are: ${!limit[*]}" >&2; exit 2; }
done

: >"$log"
failed=()
for stage in "${stages[@]}"; do
  seconds=${limit[$stage]} started=$SECONDS left=$((deadline - SECONDS)) code=0
  [ "$seconds" -le "$left" ] || seconds=$left
  printf '\n=== %s (%ss left, %ss at most)\n' "$stage" "$left" "$seconds" | tee -a "$log"
  logged=$(wc -c <"$log")
  if [ "$seconds" -lt 10 ]; then
    code=124
  else  # a shell of its own, so that timeout ends all that the stage has started
    RUN_STAGE=$stage timeout --kill-after=5 "$seconds" \
      bash benchmarks/run_gpu.sh "${dry[@]}" "$seconds" >>"$log" 2>&1 || code=$?
    tail -c "+$((logged + 1))" "$log" | tail -n 30
  fi
  [ "$code" = 0 ] || failed+=("$stage ($([ "$code" = 124 ] && echo "out of time" || echo "status $code"))")
  echo "--- $stage: $((SECONDS - started))s, status $code" | tee -a "$log"
done

printf '\n=== summary\n'
"$python" benchmarks/gpu summary "${dry[@]}" --output "$out" 2>&1 | tee -a "$log" || failed+=(summary)
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[*]}"; exit 1; }
