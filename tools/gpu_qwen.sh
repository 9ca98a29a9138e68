#!/usr/bin/env bash
# Measured peak memory and seconds per student update of the ready Qwen recipes, with random weights
# of real size, against the plan: joint T2I + edit at 1024 x 1024 on one 80 GB card.
#   tools/gpu_qwen.sh OUT          the two models on the card (about 100 GB of disk, 64 GB of RAM)
#   tools/gpu_qwen.sh OUT --toy    the same commands on tiny networks, on a CPU, in minutes
# A gap of more than 10 % makes it fail. Writes OUT/<model>.json and OUT/table.md.
set -euo pipefail
out=${1:?usage: tools/gpu_qwen.sh OUT [--toy]}
toy=${2:-}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
mkdir -p "$out"
# The allocator's holes are smaller with segments that grow.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
for name in qwen_image_21 qwen_image_edit; do
  "$python" "$here/tools/measure_update.py" "$here/recipes/$name/one_80gb.yaml" \
    --out "$out/$name.json" --updates 3 $toy
done
"$python" "$here/tools/measure_update.py" --table "$out"/qwen_*.json | tee "$out/table.md"
