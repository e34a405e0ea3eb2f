#!/usr/bin/env bash
# Makes deploy/models/tiny again: word problems, tokenizer, demonstrations, supervised warm-up. About ten
# minutes on one core. The same scripts on the same kind of CPU give the same weights.
set -euo pipefail
cd "$(dirname "$0")/../.."
deploy/scripts/setup_tools.sh
tools=third_party/tools-venv/bin/python
model=deploy/models/tiny
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

$tools deploy/scripts/make_data.py --out deploy/data
$tools deploy/scripts/make_tokenizer.py --out "$model"
# The demonstrations teach the form well and the choice of operation badly: that is left to be learned by reward.
$tools deploy/scripts/make_data.py --warmup 38400 --seed 1 --out "$work/demos.jsonl"
target/release/worker warmup --shape "$model" --demos "$work/demos.jsonl" --out "$work/model" \
  --template qwen-chat --steps 1200 --batch 32 --lr 3e-3 --seed 1 --threads 1
mv "$work/model/model.safetensors" "$model/model.safetensors"
echo "made $model"
