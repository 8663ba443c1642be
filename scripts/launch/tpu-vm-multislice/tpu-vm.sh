#!/bin/bash
# dpo on 2xv5e-16: TPU VMs as a queued resource, made by `jdpo launch tpu-vm`.
#
#   bash scripts/launch/tpu-vm-multislice/tpu-vm.sh           creates the slice and runs; or attaches to a run that goes on
#   bash scripts/launch/tpu-vm-multislice/tpu-vm.sh stop      lets the run save, and ends it
#   bash scripts/launch/tpu-vm-multislice/tpu-vm.sh delete    deletes the slice at once
#
# A slice costs until it is deleted. Ctrl-C, or a lost connection, ends this script and not the run.
#
# Paths are relative to the folder in which it is started.
#
# Change by hand: the zone, the slice in `create`, `keep`, and what the hosts do: worker.sh.

set -uo pipefail
name=llama-3-1-8b-tpu
zone=us-west4-a
# Each TPU VM of the queued resource is a slice.
slices=(llama-3-1-8b-tpu-0 llama-3-1-8b-tpu-1)
hosts_of_slice=4
hosts=8
max_restarts=20
# Keep the slice at the end.
keep=
# True if output_dir outlives the slice, so that it may be deleted after an error as well.
shared=yes
# Seconds between two looks, and before another try to create a slice.
poll=30
retry=600
# Seconds for a host to end after another one has.
patience=600
logs=scripts/launch/tpu-vm-multislice/logs
inputs=(scripts/launch/tpu-vm-multislice/worker.sh configs/llama_3_1_8b_tpu.yaml)
there=jdpo-$name

tell() { echo "$(date '+%F %T') $name: $*"; }

tpus() { gcloud compute tpus "$@" --zone="$zone" --quiet; }

create() {
  tell "creates 2xv5e-16"
  tpus queued-resources create "$name" --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite \
    --node-count=2 --node-prefix=llama-3-1-8b-tpu --reserved
}

# With --force the TPU VMs go too.
delete_slice() {
  tell "deletes the slice"
  tpus queued-resources delete "$name" --force
}

# Exit codes after which the same command continues the run.
can_continue() {
  case $1 in
    75 | 124 | 134 | 137 | 143) true ;;
    *) false ;;
  esac
}

# Tokens and keys, from the environment of this script.
secret_names=(HF_TOKEN)
secrets() {
  local each
  for each in "${secret_names[@]}"; do
    [[ -z ${!each-} ]] || printf 'export %s=%q\n' "$each" "${!each}"
  done
}

# The state of the queued resource; NONE if there is none, UNKNOWN if gcloud fails otherwise.
state() {
  local text
  if text=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>&1); then
    tail -n 1 <<<"$text"
  elif [[ $text == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$text" >&2
    echo UNKNOWN
  fi
}

# Runs a command on every host of a slice, on all at once.
ssh_all() {
  local slice=$1
  shift
  tpus tpu-vm ssh "$slice" --worker=all "$@" </dev/null
}

# Calls worker.sh on every host of every slice.
on_all() {
  local slice
  for slice in "${slices[@]}"; do
    ssh_all "$slice" --command="bash $there/worker.sh $*"
  done
}

# Asks all hosts what they do; prints a line for each one that answers, also if nothing was copied to it yet.
ask_all() {
  local slice
  for slice in "${slices[@]}"; do
    ssh_all "$slice" --command="bash $there/worker.sh status 2>/dev/null || echo jdpo-status none" 2>/dev/null
  done | grep '^jdpo-status'
}

# Unlike a plain sleep, it ends when a signal arrives.
pause() {
  sleep "$1" &
  wait $!
}

# Uses one of the restarts.
again() {
  if ((restarts >= max_restarts)); then
    tell "$1, and no restart is left of $max_restarts; start this script again to continue"
    return 1
  fi
  restarts=$((restarts + 1))
  tell "$1: restart $restarts of at most $max_restarts"
}

# Waits until the slice is there, and creates it if needed. The first time, an error of Google Cloud ends the script:
# the request may be wrong. After a preemption there may be no free slice for a while.
wait_for_slice() {
  local now before='' created='' code
  while :; do
    now=$(state)
    [[ $now == "$before" ]] || tell "the queued resource is $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      NONE)
        create
        code=$?
        created=yes
        if ((code)); then
          tell "gcloud cannot create it: exit code $code"
          ((restarts)) || return "$code"
          again "no slice" || return "$code"
          pause "$retry"
        fi
        ;;
      FAILED | SUSPENDED)
        if [[ $now == FAILED && $created ]]; then
          tpus queued-resources describe "$name" --format='value(state)' >&2
          ((restarts)) || return 1
          again "no slice" || return 1
          pause "$retry"
        fi
        delete_slice
        ;;
    esac
    pause "$poll"
  done
}

# True if the slice was taken away.
is_gone() {
  local slice now
  case $(state) in
    ACTIVE) ;;
    UNKNOWN) return 1 ;;
    *) return 0 ;;
  esac
  for slice in "${slices[@]}"; do
    now=$(tpus tpu-vm describe "$slice" --format='value(state)' 2>/dev/null)
    case $now in PREEMPTED | TERMINATED) return 0 ;; esac
  done
  return 1
}

# Copies what the hosts need, and installs it; on hosts that have it, this takes a few seconds.
prepare() {
  local slice installed tries
  for ((tries = 0; tries < 5; tries++)); do
    # A new host may refuse the first connections.
    for slice in "${slices[@]}"; do
      ssh_all "$slice" --command="mkdir -p $there" &&
        tpus tpu-vm scp --recurse --worker=all "${inputs[@]}" "$slice:$there/" </dev/null
    done
    installed=$(on_all install | grep -c '^jdpo-installed')
    if ((installed == hosts)); then return; fi
    tell "$installed of $hosts hosts are ready"
    if is_gone; then return 1; fi
    pause "$poll"
  done
  return 1
}

# Starts the run on every host, at once, and leaves it alone.
start_all() {
  local slice worker started=0
  for slice in "${slices[@]}"; do
    for ((worker = 0; worker < hosts_of_slice; worker++)); do
      # A connection for each host, since several would share one stdin.
      secrets | tpus tpu-vm ssh "$slice" --worker="$worker" --command="bash $there/worker.sh start $1" &
      ((++started % 16)) || wait
    done
  done
  wait
  tell "start $1; the logs are in $logs/$1. Ctrl-C ends this script, and not the run"
}

# Writes a log file per host: $logs/START/SLICE/HOST.log.
followers=()
follow() {
  local slice index
  for index in "${!slices[@]}"; do
    slice=${slices[index]}
    if [[ -n ${followers[index]-} ]] && kill -0 "${followers[index]}" 2>/dev/null; then continue; fi
    mkdir -p "$logs/$1/$slice"
    ssh_all "$slice" --output-directory="$logs/$1/$slice" --command="bash $there/worker.sh follow $1" >/dev/null 2>&1 &
    followers[index]=$!
  done
}

# The logs end with the run; a connection that is broken may not.
end_logs() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    kill -0 "${followers[@]}" 2>/dev/null || break
    pause 1
  done
  kill "${followers[@]}" 2>/dev/null
  followers=()
}

# Watches a start until it has ended on all hosts. Sets `outcome`: the exit code of a process whose own error ended the
# run, if there is one; or "gone"; or "stopped CODE".
watch() {
  local answers line running ended stopped id state code asked silent=0 waited=0
  while :; do
    follow "$1"
    answers=$(ask_all)
    running=0 ended=0 stopped='' outcome=0
    while read -r line id state code asked; do
      [[ -n $line ]] || continue
      if [[ $id != "$1" ]]; then
        # It was not started there, or the disk is a new one.
        state=ended code=137
      fi
      if [[ $state == running ]]; then
        running=$((running + 1))
        continue
      fi
      ended=$((ended + 1))
      if [[ $asked == stopped ]]; then stopped=yes; fi
      if ((outcome == 0)) || { ((code != 0)) && can_continue "$outcome" && ! can_continue "$code"; }; then
        outcome=$code
      fi
    done <<<"$answers"
    if ((running + ended < hosts)); then
      if is_gone; then
        outcome=gone
        kill "${followers[@]}" 2>/dev/null
        followers=()
        return
      fi
      ((silent++)) || tell "not all hosts answer; the run may go on, and this script tries again"
    elif ((running == 0)); then
      [[ -z $stopped ]] || outcome="stopped $outcome"
      end_logs
      return
    else
      silent=0
      # When a process ends, the others end by themselves within a minute; one that is stuck is killed.
      if ((ended > 0 && waited++ * poll > patience)); then on_all kill; fi
    fi
    pause "$poll"
  done
}

# Sets `start` to what runs already, or has ended and nobody has looked at.
find_start() {
  local answers
  until answers=$(ask_all) && (($(wc -l <<<"$answers") == hosts)); do
    # Without all answers it is not known whether something runs.
    tell "not all hosts answer; this script tries again"
    if is_gone; then return; fi
    pause "$poll"
  done
  start=$(awk '$2 != "none" { print $2; exit }' <<<"$answers")
}

# Ends this script; the slice stays where something on its disks may still be needed.
finish() {
  tell "ended with exit code $1"
  on_all forget >/dev/null 2>&1
  if [[ -z $keep ]] && { (($1 == 0)) || [[ $shared ]]; }; then
    delete_slice || tell "the slice is there, and costs until it is deleted: bash $0 delete"
  else
    tell "the slice is kept, and costs until it is deleted: bash $0 delete"
  fi
  exit "$1"
}

detach() {
  trap - TERM INT HUP
  tell "this script ends. The slice stays, costs, and the run on it goes on. To watch it again: bash $0." \
    "To save and end it: bash $0 stop"
  # shellcheck disable=SC2046 # several numbers
  kill $(jobs -p) 2>/dev/null
  exit $((128 + $1))
}
trap 'detach 15' TERM
trap 'detach 2' INT
trap 'detach 1' HUP

restarts=0
start=
first=$(state)
if [[ $first == UNKNOWN ]]; then exit 1; fi
case ${1-} in
  '')

    if [[ $first == ACTIVE ]]; then find_start; fi
    ;;
  stop)
    if [[ $first == ACTIVE ]]; then find_start; fi
    if [[ -z $start ]]; then
      tell "there is no run"
      exit 1
    fi
    on_all stop
    ;;
  delete)
    delete_slice
    exit
    ;;
  *)
    echo "usage: bash $0 [stop | delete]" >&2
    exit 2
    ;;
esac
[[ -z $start ]] || tell "attaches to start $start"

while :; do
  if [[ -z $start ]]; then
    wait_for_slice || exit
    if ! prepare; then
      if is_gone; then
        again "the slice was taken away" || exit 1
        delete_slice
        continue
      fi
      tell "the hosts cannot be prepared; the slice is kept, and costs until it is deleted: bash $0 delete"
      exit 1
    fi
    start=$(date -u +%Y%m%d-%H%M%S)-$restarts
    start_all "$start"
  fi
  watch "$start"
  start=
  case $outcome in
    gone)
      again "the slice was taken away" || exit 1
      delete_slice
      ;;
    stopped*) finish "${outcome#stopped }" ;;
    *)
      can_continue "$outcome" || finish "$outcome"
      again "exit code $outcome" || finish "$outcome"
      ;;
  esac
done
