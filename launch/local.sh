#!/usr/bin/env bash
# Several processes on this machine, with simulated CPU devices: the multi-host path without a cluster.
#   launch/local.sh PROCESSES DEVICES_EACH train.py --config configs/demo.py
# DRY=1 prints the commands.
set -euo pipefail
processes=$1 devices=$2
shift 2
export JAX_PLATFORMS=cpu NPROC="${NPROC:-16}"  # a bigger XLA thread pool: several devices on few cores deadlock otherwise
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
# XLA forgets the order of collectives in a program that it reads back: a deadlock.
export JAX_ENABLE_COMPILATION_CACHE="${JAX_ENABLE_COMPILATION_CACHE:-false}"
pids=()
for ((process = 0; process < processes; process++)); do
  command=("${PYTHON:-python}" "$@" --coordinator "localhost:${PORT:-12421}" --num_processes "$processes"
           --process_id "$process")
  if [[ -n ${DRY:-} ]]; then
    echo "${command[*]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done
[[ -z ${DRY:-} ]] || exit 0
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM  # as a scheduler would: the run saves and ends with 75
status=0
for pid in "${pids[@]}"; do
  wait "$pid" && code=0 || code=$?
  while kill -0 "$pid" 2>/dev/null; do  # the signal ended the wait, not the process
    wait "$pid" && code=0 || code=$?
  done
  [[ $code == 0 ]] || status=$code
done
exit "$status"
