#!/bin/bash
# dpo on h100x16: a batch script for Slurm, made by `jdpo launch slurm`.
#
#   sbatch slurm.sh
#
# Change by hand: the options of sbatch below (nodes, partition, time, chdir, output), the caches, and the command.
#SBATCH --job-name=llama-3-1-8b-lora
#SBATCH --time=24:00:00
#SBATCH --nodes=2

# one task (process) per node, which uses all of its GPUs
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8

# whole nodes: all of their cores, which read and tokenize the data, and all of their memory
#SBATCH --exclusive
#SBATCH --mem=0

# so many seconds before the time limit, SIGTERM to all tasks, which save and exit with 143. With B: in front it would
# reach this script and no task
#SBATCH --signal=TERM@120

# Slurm may start the job again, as after the failure of a node; jdpo resumes by itself
#SBATCH --requeue

# the next start continues the log
#SBATCH --open-mode=append

# in a folder that exists: sbatch creates none
#SBATCH --output=/shared/project/scripts/launch/slurm/llama-3-1-8b-lora-%j.out

# for relative paths of the config
#SBATCH --chdir=/shared/project

# tokens and keys come from the environment in which sbatch is called
#SBATCH --export=ALL

set -uo pipefail
max_restarts=20

# tokens, reference log-probs and compiled programs (jdpo), and models of the hub (huggingface): kept for the next start
export XDG_CACHE_HOME=/shared/cache
# lines reach the log when they are printed
export PYTHONUNBUFFERED=1
# the share of a GPU that JAX reserves, formerly XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is for CUDA and NCCL
export XLA_CLIENT_MEM_FRACTION=0.92
# NCCL says why a connection fails
export NCCL_DEBUG=WARN

tell() { echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# True once Slurm itself ends or requeues the job: after scancel, preemption, the time limit.
is_ending() { [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null) == @(COMPLETING|CANCELLED) ]]; }

# The signals that Slurm sends before the time limit and before a preemption, and those of `scancel --signal=TERM`, reach
# the tasks and not this script. Those of `scancel --batch` and of --signal=B: reach this script alone: it passes them on.
# It does not pass on what Slurm has sent to the tasks as well, since a second SIGTERM ends a run at once; nor to srun,
# which would kill the tasks instead of letting them save.
interrupted=
# shellcheck disable=SC2329 # the trap calls it
pass_on() {
  interrupted=yes
  if ! is_ending; then
    scancel --signal=TERM "$SLURM_JOB_ID"
  fi
}
trap pass_on TERM

# Runs a command as the tasks of the job; the exit code is the highest of theirs, so that 75 of tasks that wait for another
# hides its 1 or 2 if it fails before they have joined.
run_tasks() {
  local tasks code
  # When a task ends, the others end by themselves within a minute, with a message; one that is stuck is killed later.
  # The tasks may use all cores of the job; srun would bind each to its first ones.
  srun --kill-on-bad-exit=0 --wait=600 --cpu-bind=none --export=ALL \
    --open-mode=append --output=/shared/project/scripts/launch/slurm/llama-3-1-8b-lora-%j-%t.log "$@" &
  tasks=$!
  while :; do
    interrupted=
    wait "$tasks"
    code=$?
    # A trap has interrupted the wait, and the code is that of the signal: wait again for the tasks, which are saving.
    [[ $interrupted ]] || return "$code"
  done
}

tell "begins on $SLURM_JOB_NODELIST"
run_tasks jdpo doctor configs/llama_3_1_8b_lora.yaml --task dpo
code=$?
if ((code == 0)); then
  run_tasks jdpo dpo configs/llama_3_1_8b_lora.yaml
  code=$?
fi

case $code in
  75 | 124 | 134 | 137 | 143) ;; # the same command continues the run
  *)
    tell "ended with exit code $code"
    exit "$code"
    ;;
esac
if is_ending; then
  # A requeue would undo scancel.
  tell "ended by Slurm, with exit code $code"
elif ((${SLURM_RESTART_COUNT:-0} >= max_restarts)); then
  tell "exit code $code, and no restart is left of $max_restarts; submit the script again to continue"
elif scontrol requeue "$SLURM_JOB_ID"; then
  tell "exit code $code: requeued"
else
  tell "exit code $code, and Slurm does not requeue it; submit the script again to continue"
fi
exit "$code"
