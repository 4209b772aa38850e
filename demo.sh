#!/bin/sh
# The main job on the pico model: look, calibrate, quantize to GPTQ and to GGUF, and measure both. Ends in a temporary folder.
set -eu
bin=$(cd "$BIN" && pwd)
model=$(cd "$MODEL" && pwd)
out=$(mktemp -d)
run() { echo; echo "\$ quantcli $*"; "$bin/quantcli" "$@"; }

run inspect "$model"
run calibrate "$model" --samples 32 --seq-len 256 -o "$out/stats.safetensors"
run quantize "$model" --method gptq --group-size 128 --samples 32 --seq-len 256 -o "$out/pico-gptq"
run eval "$out/pico-gptq" --baseline "$model" --seq-len 256 --samples 16
cd "$model"
run export --format gguf Q4_K_M -o "$out/pico-Q4_K_M.gguf"
run eval "$out/pico-Q4_K_M.gguf" --baseline "$model" --seq-len 256 --samples 16
run quantize "$model" --method gptq --type Q4_K_M --samples 32 --seq-len 256 -o "$out/pico-gptq-Q4_K_M.gguf"
run eval "$out/pico-gptq-Q4_K_M.gguf" --baseline "$model" --seq-len 256 --samples 16
echo
echo "The files are in $out"
