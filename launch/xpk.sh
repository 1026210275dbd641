#!/usr/bin/env bash
# A job on a GKE cluster, with XPK: several TPU slices, restarted when they are taken away.
#   CLUSTER=pods WORKLOAD=mine IMAGE=REGISTRY/internvlx:1 TYPE=v5litepod-256 SLICES=2 \
#     launch/xpk.sh --config configs/hd_finetune.py --set output_dir=gs://BUCKET/mine
# DRY=1 prints the command.
set -euo pipefail
train="python train.py $(printf '%q ' "$@")--coordinator auto --timeout 1200"
command=(xpk workload create --cluster "${CLUSTER:?}" --workload "${WORKLOAD:?}" --docker-image "${IMAGE:?}"
         --tpu-type "${TYPE:?such as v5litepod-256}" --num-slices "${SLICES:-1}" --max-restarts "${RESTARTS:-50}"
         --command "$train")
if [[ -n ${DRY:-} ]]; then echo "${command[*]}"; else "${command[@]}"; fi
