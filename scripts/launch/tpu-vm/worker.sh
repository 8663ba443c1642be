#!/bin/bash
# What each host of v6e-16 does for llama-3-1-8b-tpu. tpu-vm.sh copies this script to the hosts and calls it there.
#
# Change by hand: what is installed, the environment, and the command.

set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
config=$here/llama_3_1_8b_tpu.yaml
# The run starts here: relative paths of the config, such as output_dir, are in this folder.
folder=/mnt/jdpo
nfs=10.0.0.2:/share
package='jdpo[tpu,gcs] @ git+https://github.com/my-organization/jdpo@v0.2.0'
logs=$folder/logs/llama-3-1-8b-tpu
export PATH=$here/venv/bin:$HOME/.local/bin:$PATH

fail() {
  echo "jdpo: error: $HOSTNAME: $*" >&2
  exit 1
}

# Makes the folder, which is a mount that all hosts share if there is an NFS server. A reboot loses the mount.
make_folder() {
  [[ -d $folder ]] || sudo mkdir -p "$folder" || fail "cannot make $folder"
  if [[ $nfs ]] && ! mountpoint -q "$folder"; then
    command -v mount.nfs >/dev/null || { sudo apt-get update -q && sudo apt-get install -y -q nfs-common; } ||
      fail "cannot install nfs-common"
    # hard: a server that is away for a while delays writes, and does not lose them.
    sudo mount -t nfs -o hard,noatime "$nfs" "$folder" || fail "cannot mount $nfs"
  fi
  # A new share belongs to root.
  [[ -w $folder ]] || sudo chmod 1777 "$folder" || fail "cannot make $folder writable"
}

# Installs jdpo in an environment in the current folder, unless it is there.
install_jdpo() {
  local mark
  # A wheel may have been built again with the same name.
  mark="$package $(cat requirements-tpu.txt </dev/null | cksum)"
  if [[ $(cat installed 2>/dev/null) != "$mark" ]]; then
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/0.13.9/install.sh | sh || fail "cannot install uv"
    rm -rf venv
    uv venv --quiet --python 3.12 venv || fail "cannot make an environment of Python"
    uv pip install --quiet --python venv/bin/python --constraint requirements-tpu.txt "$package" || fail "cannot install $package"
    echo "$mark" >installed
  fi
}

# Prepares a host, once.
install() {
  make_folder
  cd "$here" || fail "no $here"
  install_jdpo
  # gcloud does not report the exit code of every host, so that the answers are counted.
  echo jdpo-installed
}

environment() {
  # tokens, reference log-probs and compiled programs (jdpo), and models of the hub (huggingface): kept for the next
  # start
  export XDG_CACHE_HOME=/mnt/jdpo/cache
  # lines reach the log when they are printed
  export PYTHONUNBUFFERED=1
  # what JAX itself adds; jdpo hands its options to the compiler with each program, and not here
  export LIBTPU_INIT_ARGS=--xla_tpu_use_enhanced_launch_barrier=true
}

# Starts the run with a name of its own. It goes on when the connection is lost.
start() {
  # Tokens and keys come over the connection: they are in the memory of the run, and in no file or command line.
  eval "$(cat)"
  if is_running "$(cat "$here/current" 2>/dev/null)"; then
    # It was left alone when the others were started again.
    kill -KILL "$(cat "$here/child")" "$(cat "$here/pid")"
  fi
  make_folder
  mkdir -p "$logs" || fail "cannot make $logs"
  rm -f "$here/child"
  setsid nohup bash "$here/worker.sh" run "$1" </dev/null >>"$logs/$1-$HOSTNAME.log" 2>&1 &
  echo $! >"$here/pid"
  echo "$1" >"$here/current"
}

# Runs a command, which `stop` can find. SIGTERM of a host that shuts down reaches the command by itself.
child() {
  local code
  "$@" &
  echo $! >"$here/child"
  while :; do
    wait $!
    code=$?
    # The wait was interrupted by a signal while the command still saves.
    kill -0 $! 2>/dev/null || return "$code"
  done
}

run() {
  trap : TERM
  environment
  cd "$folder" || {
    echo 1 >"$here/$1.exit"
    exit
  }
  child jdpo doctor "$config" --task dpo &&
    child jdpo dpo "$config"
  echo $? >"$here/$1.part" && mv "$here/$1.part" "$here/$1.exit"
}


is_running() { [[ $1 ]] && grep -qs "$1" "/proc/$(cat "$here/pid")/cmdline"; }

# Prints: the name of the current start, "running" or "ended", the exit code, "stopped" if that was asked for.
status() {
  local id state=running code=- stopped=-
  id=$(cat "$here/current" 2>/dev/null)
  if [[ -z $id ]]; then
    echo "jdpo-status none"
    return
  fi
  if ! is_running "$id"; then
    state=ended
    # No exit code: the host was restarted, or the system killed the script.
    code=$(cat "$here/$id.exit" 2>/dev/null || echo 137)
  fi
  [[ ! -e $here/$id.stopped ]] || stopped=stopped
  echo "jdpo-status $id $state $code $stopped"
}

# Lets the run save and end.
stop() {
  local id
  id=$(cat "$here/current" 2>/dev/null)
  is_running "$id" || return 0
  touch "$here/$id.stopped"
  while [[ ! -s $here/child ]]; do sleep 1; done
  kill -TERM "$(cat "$here/child")"
}

case $1 in
  install) install ;;
  start) start "$2" ;;
  run) run "$2" ;;
  status) status ;;
  stop) stop ;;
  kill) if is_running "$(cat "$here/current")"; then kill -KILL "$(cat "$here/child")"; fi ;;
  follow) tail -n +1 --pid="$(cat "$here/pid")" -F "$logs/$2-$HOSTNAME.log" ;;
  forget) rm -f "$here/current" ;;
  *) fail "unknown action: $1" ;;
esac
