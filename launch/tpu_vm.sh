#!/usr/bin/env bash
# A TPU slice, or several, by queued resources: create, install, train, delete.
#   NAME=mine ZONE=us-west4-a TYPE=v5litepod-256 launch/tpu_vm.sh create --spot
#   NAME=mine ZONE=us-west4-a launch/tpu_vm.sh install
#   NAME=mine ZONE=us-west4-a launch/tpu_vm.sh train --config configs/hd_finetune.py --set output_dir=gs://BUCKET/mine
#   NAME=mine ZONE=us-west4-a launch/tpu_vm.sh delete
# SLICES=2: several slices. RUNTIME: the image of the VMs. DRY=1 prints the commands.
set -euo pipefail
: "${NAME:?the name of the queued resource}" "${ZONE:?its zone}"
slices=${SLICES:-1}
repository=${REPOSITORY:-https://github.com/OWNER/internvlx-jax.git}

run() {
  if [[ -n ${DRY:-} ]]; then echo "$*"; else "$@"; fi
}

on_all_workers() {  # of every slice, side by side
  local slice node pids=() status=0
  for ((slice = 0; slice < slices; slice++)); do
    node=$NAME
    [[ $slices == 1 ]] || node=$NAME-$slice
    run gcloud compute tpus tpu-vm ssh "$node" --zone "$ZONE" --worker all --command "$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

action=${1:?create, install, train or delete}
shift
case $action in
  create)
    nodes=(--node-id "$NAME")
    [[ $slices == 1 ]] || nodes=(--node-count "$slices" --node-prefix "$NAME")
    run gcloud compute tpus queued-resources create "$NAME" --zone "$ZONE" "${nodes[@]}" \
      --accelerator-type "${TYPE:?such as v5litepod-256}" --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}" "$@"
    ;;
  install)
    on_all_workers "git clone $repository internvlx-jax; cd internvlx-jax && python3 -m venv .venv \
&& .venv/bin/pip install --editable '.[tpu,gcs]'"
    ;;
  train)
    on_all_workers "cd internvlx-jax && .venv/bin/python train.py $(printf '%q ' "$@")--coordinator auto --timeout 600"
    ;;
  delete) run gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force ;;
  *) echo "unknown action $action" >&2; exit 2 ;;
esac
