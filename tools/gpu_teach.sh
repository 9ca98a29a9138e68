#!/usr/bin/env bash
# Trains the lab's teachers long, on one GPU, in one call: autoencoder as shipped, base from scratch,
# then both specialists from it, then scores all three. Called again it resumes. Usage: tools/gpu_teach.sh [OUT] [UPDATES]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu-teachers}
updates=${2:-15000}
python=${PYTHON:-python3}
fewstep() { "$python" -m fewstep.cli "$@"; }

resume() { [ -f "$1/checkpoints/last.pt" ] && echo --resume || true; }

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
fewstep teach recipes/lab/teach_base.yaml --out "$out/base" $(resume "$out/base") \
    --set budget.updates="$updates" --set budget.batch=512 --set pool_size=40000 \
    --set time_shift=2 --set "composition.t2i={landscape: 1, portrait: 1, text: 3}" \
    --set composition.edit.text_edit=2
for name in t2i edit; do
    fewstep teach "recipes/lab/teach_$name.yaml" --out "$out/$name" $(resume "$out/$name") \
        --set init="$out/base/teacher.safetensors" --set budget.updates=$((updates / 4)) \
        --set budget.batch=512 --set pool_size=40000
done
for name in base t2i edit; do
    fewstep lab score "$out/$name/teacher.safetensors" --per-category 100 | tee "$out/$name/scores.txt"
done
echo "copy $out/{base,t2i,edit}/teacher.safetensors to fewstep/lab/weights/{base,t2i,edit}.safetensors"
