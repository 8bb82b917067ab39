#!/bin/bash
# A whole check on a machine with a GPU, in a few minutes: benchmarks/gpu_check.sh OUT [STAGE ...]
#
# First what needs no quiet machine, side by side: the device tests, the sanitizers on a small model, the stress runs,
# and one pass over the decode cells with the full gate (which also fills the caches of compiled code). Then, alone:
# the decode table and the timeline of a step. Every stage has a time limit of its own and a log in OUT; the summary
# comes last. The status is 1 if a stage failed. LIMIT=seconds lowers the limits, models="..." chooses the models.
cd "$(dirname "$0")/.." || exit 2
out=$1; shift
stages=" ${*:-build device sanitize stress buffers gate compile decode timeline} "
models=${models:-llama-3.2-1b qwen3-0.6b qwen3-1.7b}
mkdir -p "$out/state"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/jax_cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

stage() { # log, name, seconds, command ...
  local log=$out/$1.txt name=$2 limit=$3 begin=$SECONDS result=ok
  shift 3
  [[ -n $LIMIT && $LIMIT -lt $limit ]] && limit=$LIMIT
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || result="FAILED ($?)"
  printf '%-24s %4d s  %s\n' "$name" $((SECONDS - begin)) "$result" >"$out/state/$name"
}
wanted() { [[ $stages == *" $1 "* ]]; }
decode() { python3 -m benchmarks.decode --implementation cuda --batch 1,8 --context 1000 --model "$@"; }
export -f decode

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >"$out/machine.txt"
wanted build && stage build build 150 python3 -m pip install --no-build-isolation --no-deps -e .

wanted device && stage device device 170 python3 -m pytest -q -p no:cacheprovider tests/device &
if wanted sanitize; then
  for tool in memcheck racecheck; do
    stage sanitize-$tool $tool 120 compute-sanitizer --tool $tool --error-exitcode 3 --print-limit 5 \
      python3 -m benchmarks.gpu_stress once &
  done
fi
wanted stress && stage stress stress 170 python3 -m benchmarks.gpu_stress &
if wanted buffers; then
  XLA_FLAGS=--xla_gpu_enable_command_buffer= stage buffers buffers-off 60 python3 -m benchmarks.gpu_stress small --launches 500 &
  XLA_FLAGS="--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1" \
    stage buffers buffers-on 60 python3 -m benchmarks.gpu_stress small loop --launches 500 &
fi
if wanted gate; then
  for m in $models; do stage gate "gate-$m" 150 bash -c "decode $m --repeats 1 --json $out/gate-$m.json" & done
fi
wait
wanted compile && stage compile compile 100 python3 -m benchmarks.compile --model qwen3-8b --layers 4 --target cuda &
if wanted decode; then
  for m in $models; do stage decode "decode-$m" 70 bash -c "decode $m --gate-steps 8 --json $out/decode-$m.json"; done
fi
wanted timeline && stage timeline timeline 60 python3 -m benchmarks.timeline --model llama-3.2-1b --batch 1,8
wait
cat "$out"/state/* | tee -a "$out/machine.txt"
! grep -q FAILED "$out"/state/*
