#!/bin/bash
# dpo on h100x8: a script for one machine, made by `jdpo launch host`.
#
#   bash scripts/launch/host/host.sh
#
# Change by hand: the folder, the number of processes and the devices of each, the cache, and the command.

set -u
# Each process gets a group of its own, so that Ctrl-C reaches it once: from this script.
set -m
max_restarts=20
backoff=10
processes=1
devices_each=8
# Seconds for a process to end after another one has.
patience=600
log=scripts/launch/host/llama-3-1-8b-lora
# Paths of the config, and this one, are relative to:
cd /shared/project || exit

# tokens, reference log-probs and compiled programs (jdpo), and models of the hub (huggingface): kept for the next start
export XDG_CACHE_HOME=/shared/cache
# lines reach the log when they are printed
export PYTHONUNBUFFERED=1
# the share of a GPU that JAX reserves, formerly XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is for CUDA and NCCL
export XLA_CLIENT_MEM_FRACTION=0.92
# NCCL says why a connection fails
export NCCL_DEBUG=WARN

tell() { echo "$(date '+%F %T') $*" | tee -a "$log.log"; }

# Exit codes after which the same command continues the run.
can_continue() { [[ $1 == @(75|124|134|137|143) ]]; }

# A first signal lets the run save and end, a second one ends it at once.
asked=
pids=()
pass_on() {
  asked=$1
  ((${#pids[@]} == 0)) || kill -s "$1" -- "${pids[@]}" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on HUP' HUP

asked_code() { return $((128 + $(kill -l "$asked"))); }

# Unlike a plain sleep, it ends when a signal arrives.
pause() {
  sleep "$1" &
  wait "$!"
  kill "$!" 2>/dev/null && wait "$!" 2>/dev/null
}

# Runs a command in every process. The exit code is that of a process whose own error ended the run, if there is one.
run_all() {
  local index port pid one code=0 waited=0 running first
  [[ -z $asked ]] || asked_code || return
  port=$((20000 + RANDOM % 10000))
  pids=()
  for ((index = 0; index < processes; index++)); do
    if ((processes > 1)); then
      first=$((index * devices_each))
      export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_PROCESS_ID=$index
      JAX_LOCAL_DEVICE_IDS=$(seq -s , "$first" $((first + devices_each - 1)))
      export JAX_LOCAL_DEVICE_IDS
    fi
    JAX_NUM_PROCESSES=$processes "$@" </dev/null >>"$log-$index.log" 2>&1 &
    pids+=("$!")
  done
  while :; do
    running=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then running+=("$pid"); fi
    done
    ((${#running[@]})) || break
    # When a process ends, the others end by themselves within a minute; one that is stuck is killed.
    if ((${#running[@]} < processes && ++waited > patience)); then kill -KILL "${running[@]}"; fi
    pause 1
  done
  for pid in "${pids[@]}"; do
    wait "$pid"
    one=$?
    if ((code == 0)) || { ((one != 0)) && can_continue "$code" && ! can_continue "$one"; }; then code=$one; fi
  done
  pids=()
  return "$code"
}

start() {
  run_all jdpo dpo configs/llama_3_1_8b_lora.yaml
}

restarts=0
tell "starts; its output is in $log-0.log"
until start; do
  code=$?
  if [[ $asked ]] || ! can_continue "$code"; then
    tell "ended with exit code $code"
    exit "$code"
  fi
  if ((restarts >= max_restarts)); then
    tell "exit code $code, and no restart is left of $max_restarts; start this script again to continue"
    exit "$code"
  fi
  restarts=$((restarts + 1))
  tell "exit code $code: restart $restarts of at most $max_restarts in $backoff s"
  pause "$backoff"
  backoff=$((backoff * 2 < 300 ? backoff * 2 : 300))
done
tell "done"
