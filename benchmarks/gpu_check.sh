#!/bin/bash
# A whole check on a machine with a GPU, in three parts of at most nine minutes each:
#
#   GPU_CHECK_COMMIT=$(git rev-parse --short HEAD) benchmarks/gpu_check.sh OUT correct | speed | rest | STAGE ...
#
# correct: build; then all side by side: the device tests, sanitizers on a small model, stress runs, command buffers on
#          and off, the gate of every model with 64 steps.
# speed:   with nothing beside it: the decode table with a gate of 8 steps, the timeline of a step.
# rest:    compile of Qwen3-8B, cold and cached; decode as sm_80 code and of Qwen3-8B.
#
# Within a part the stages come in order of importance, each under a time limit of its own and all under that of the part
# (BUDGET seconds): what no longer fits is left out, and the table at the end says so. OUT gets summary.txt, tables.txt
# and logs.tar.gz. The status is 1 if a stage failed. models="..." chooses the models.
cd "$(dirname "$0")/.." || exit 2
out=${1:?where to write}; shift
parts=${*:-correct}
models=${models:-llama-3.2-1b qwen3-0.6b qwen3-1.7b}
budget=${BUDGET:-510}
python=${PYTHON:-python3}
logs=$out/logs
mkdir -p "$logs/state"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/jax_cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
count=0

left() { echo $((budget - SECONDS)); }
# name, seconds, command ...: runs it under its limit, or what is left of the budget; log and verdict under $logs.
stage() {
  local name=$1 limit=$2 begin=$SECONDS result=ok room
  shift 2
  room=$(left)
  if ((room < 10)); then
    printf '%-22s %4s    left out\n' "$name" - >"$logs/state/$order-$name"
    return
  fi
  ((limit > room)) && limit=$room
  timeout -k 5 "$limit" "$@" >"$logs/$name.txt" 2>&1 || result="FAILED ($?)"
  printf '%-22s %4d s  %s\n' "$name" $((SECONDS - begin)) "$result" >"$logs/state/$order-$name"
}
run() { ((count++)); order=$(printf %02d "$count") stage "$@"; }
beside() { ((count++)); order=$(printf %02d "$count") stage "$@" & }
decode() { "$python" -m benchmarks.decode --implementation cuda --context 1000 "$@"; }
export python
export -f decode

# The tests of some files in so many processes, dealt round: name, processes, seconds, files ...
tests() {
  local name=$1 n=$2 limit=$3 i
  shift 3
  "$python" -m pytest -q --collect-only -p no:cacheprovider "$@" 2>"$logs/$name-collect.txt" | grep '^tests/.*::' >"$logs/$name.ids"
  if [[ ! -s $logs/$name.ids ]]; then
    ((count++))
    printf '%-22s %4s    FAILED (no tests: is there a GPU?)\n' "$name" - >"$logs/state/$(printf %02d "$count")-$name"
    return
  fi
  for ((i = 0; i < n; i++)); do
    awk -v n="$n" -v i="$i" 'NR % n == i' "$logs/$name.ids" >"$logs/$name-$i.ids"
    [[ -s $logs/$name-$i.ids ]] && beside "$name-$i" "$limit" xargs -d '\n' -a "$logs/$name-$i.ids" "$python" -m pytest -q -p no:cacheprovider
  done
}

build() {
  "$python" -c 'import jax_mpk._ext as e; e.cuda_read_bandwidth' 2>/dev/null && [[ $(cat /tmp/gpu_check_built 2>/dev/null) == "$GPU_CHECK_COMMIT" ]] && return
  "$python" -m pip install --no-build-isolation --no-deps -e . && echo "$GPU_CHECK_COMMIT" >/tmp/gpu_check_built
}
export -f build

# name, tool, with tensor copies or without: racecheck cannot instrument them (an illegal instruction).
sanitize() {
  beside "$1" 170 env JAX_MPK_STREAM="$3" compute-sanitizer --tool "$2" --error-exitcode 3 --print-limit 5 "$python" -m benchmarks.gpu_stress once
}

part() {
  case $1 in
    build) run build 150 bash -c build ;;
    device) tests device 2 200 tests/device/test_cuda_contract.py tests/device/test_cuda_tasks.py tests/device/test_cuda_runtime.py ;;
    functions) tests functions 4 400 tests/device/test_cuda_functions.py ;;
    models) tests models 8 400 tests/device/test_cuda_models.py ;;
    sanitize) sanitize memcheck memcheck on; sanitize memcheck-direct memcheck off; sanitize racecheck-direct racecheck off ;;
    stress) beside stress 200 "$python" -m benchmarks.gpu_stress ;;
    gates)
      local m
      for m in $models; do beside "gate-$m" 400 bash -c "decode --model $m --batch 1,8 --repeats 1 --gate-steps 64 --json $logs/gate-$m.json"; done ;;
    timeline) run timeline 70 "$python" -m benchmarks.timeline --model llama-3.2-1b --batch 1,8 ;;
    decode)
      local m
      for m in $models; do run "decode-$m" 130 bash -c "decode --model $m --batch 1,8 --gate-steps 8 --json $logs/decode-$m.json"; done ;;
    compile) run compile 120 "$python" -m benchmarks.compile --model qwen3-8b --layers 36 --target cuda --json "$logs/compile.json" ;;
    buffers)
      beside buffers-off 170 env XLA_FLAGS=--xla_gpu_enable_command_buffer= "$python" -m benchmarks.gpu_stress small --launches 500
      beside buffers-on 170 env XLA_FLAGS="--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1" \
        "$python" -m benchmarks.gpu_stress small loop --launches 500 ;;
    sm_80) run decode-sm_80 100 env JAX_MPK_ARCH=sm_80 bash -c "decode --model llama-3.2-1b --batch 1,8 --gate-steps 16 --repeats 2 --json $logs/decode-sm_80.json" ;;
    large) run decode-qwen3-8b 160 bash -c "decode --model qwen3-8b --batch 1,16 --gate-steps 8 --repeats 3 --json $logs/decode-qwen3-8b.json" ;;
    correct) part build; part device; part functions; part models; part gates; part sanitize; part stress; part buffers; wait ;;
    speed) part build; part decode; part timeline ;;
    rest) part build; part compile; part sm_80; part large ;;
    *) echo "no part or stage is called $1" >&2; exit 2 ;;
  esac
}

for p in $parts; do part "$p"; done
wait
{
  echo "commit ${GPU_CHECK_COMMIT:-unknown}, $(date -u +%FT%TZ), parts: $parts"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -1
} >"$out/summary.txt"
# A log that fails shows its end; one with a table, the table.
for f in "$logs"/*.txt; do
  if grep -q '[┏┡]' "$f"; then sed -n '/^ *\(decode\|compile\|[a-z0-9.-]*, batch\)/,$p' "$f"; fi
done >"$out/tables.txt"
for s in "$logs"/state/*; do
  if grep -q FAILED "$s"; then
    name=$(basename "$s" | cut -d- -f2-)
    { echo "--- $name"; tail -n 25 "$logs/$name.txt" 2>/dev/null | cut -c1-300; } >>"$out/tables.txt"
  fi
done
grep -hE '^(ok  |FAIL) |passed|failed' "$logs"/*.txt 2>/dev/null | cut -c1-200 >>"$out/summary.txt"
cat "$logs"/state/* >>"$out/summary.txt"
tail -c 9000 "$out/tables.txt"
cat "$out/summary.txt"
failed=$(grep -lE 'FAILED' "$logs"/state/* | wc -l)
tar -C "$out" -czf "$out/logs.tar.gz" logs && rm -rf "$logs"
((failed == 0))
