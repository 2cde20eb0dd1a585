#!/usr/bin/env bash
# Train the embedded models and put them into the package: VAE, judge, teacher, then the student by ADD.
#
#     training/embedded.sh [MINUTES]     stops after MINUTES of each stage; run it again to go on
#
# On a GPU, set larger batches: PRETRAIN="--set batch_size=128 --set teacher_images=2000000"
# DISTILL="--set train.batch_size=64 --set train.num_images=400000" training/embedded.sh 8
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:+--minutes $1}
export PYTHONPATH=src
# shellcheck disable=SC2086
{
  python3 -m onestroke pretrain $minutes ${PRETRAIN:-} --out runs/pretrain
  python3 -m onestroke distill mini-long --teacher runs/pretrain/teacher $minutes ${DISTILL:-} --out runs/embedded
  python3 benchmarks/pack_embedded.py --teacher runs/pretrain/teacher --student runs/embedded/student \
    --judge runs/pretrain/judge/judge.safetensors
}
