#!/usr/bin/env bash
# The whole path on real pictures: make and curate a set of packages' art, train a teacher on it for 20 minutes, distil it,
# and report (docs/report/real_pictures.json). Each step goes on where it was stopped. About 70 minutes on 2 cores.
#
#     training/real_pictures.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/real}
onestroke="${PYTHON:-python3} -m onestroke"
export PYTHONPATH=src

[ -d "$out/curated" ] || ${PYTHON:-python3} benchmarks/real_pictures.py --out "$out"
mkdir -p "$out/train" "$out/held"   # the last two shards are held out
shards=("$out"/curated/*.tar)
for shard in "${shards[@]:0:${#shards[@]}-2}"; do ln -f "$shard" "$out/train/"; done
for shard in "${shards[@]: -2}"; do ln -f "$shard" "$out/held/"; done

$onestroke pretrain --data "$out/train" --size 64 --set vae=embedded-teacher --set teacher_images=62000 --minutes 20 \
  --out "$out/pretrain"
$onestroke encode "$out/train" --recipe mini --teacher "$out/pretrain/teacher" --set data.size=64
$onestroke distill mini --teacher "$out/pretrain/teacher" --data "$out/train" --set data.size=64 \
  --set anchors.count=5000 --set anchors.images=20000 --set anchors.learning_rate=2e-3 --set losses.distill_weight=10 \
  --set losses.r1_gamma=1e-4 --set discriminator_optimizer.learning_rate=1e-4 --set student_optimizer.decay=linear \
  --set train.num_images=20000 --minutes 24 --out "$out/add"
$onestroke evaluate "$out/add/student" --teacher "$out/pretrain/teacher" --data "$out/held" --steps 1,4 --size 64 \
  --num-images 400 --out "$out/evaluation"
