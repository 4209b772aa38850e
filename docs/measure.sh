#!/bin/sh
# The figures of docs/performance.md and the picture of docs/run.md, taken on this machine: docs/measure.sh [speed|picture] …
#   PYTHON=.venv/bin/python        the environment to run in
#   QUANTCLI_LIBGGML=…/libggml-base.so   ggml to compare with (tests/PEERS.md); without it that table is left out
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "${PYTHON:-$root/.venv/bin/python}")" && pwd)/$(basename "${PYTHON:-python}")
export OMP_NUM_THREADS=1

machine() {
    echo "$(date -u +%F), $(uname -m), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), load $(cut -d ' ' -f 1 /proc/loadavg)"
}

speed() {
    machine
    "$python" "$root/tests/bench/bench_solve.py"
    "$python" "$root/tests/bench/bench_awq.py"
    [ -z "${QUANTCLI_LIBGGML:-}" ] || "$python" "$root/tests/bench/bench_blocks.py" "$QUANTCLI_LIBGGML"
}

run() {
    echo "\$ quantcli $*"
    "$python" -c 'from quantcli.cli import main; main()' "$@" 2>&1
}

picture() {
    machine
    folder=$(mktemp -d)
    cp -r "${MODEL:-$root/tests/data/pico}" "$folder/pico"
    cd "$folder"
    run inspect pico
    run quantize pico --method gptq --group-size 128 --samples 32 --seq-len 256
    run eval pico-gptq-int4 --baseline pico --samples 16 --seq-len 256
    run export pico Q4_K_M
    run eval pico-Q4_K_M.gguf --baseline pico --samples 16 --seq-len 256 -q
    run quantize pico --method gptq --type Q4_K_M --samples 32 --seq-len 256 -q -o pico-gptq-Q4_K_M.gguf
    run eval pico-gptq-Q4_K_M.gguf --baseline pico --samples 16 --seq-len 256 -q
    cd "$root"
    rm -r "$folder"
}

for what in "${@:-speed}"; do "$what"; done
