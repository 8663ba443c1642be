"""Stand-ins for Google Cloud's TPU VMs: a `gcloud` that keeps its state in files, and what is on a host.

The folder of the environment variable CLOUD holds it all:
  state: state of the queued resource, such as ACTIVE; none before it is created.
  queue: states that it has one after the other before that.
  deaf: a line for each connection that fails.
  hosts/SLICE-N: the home folder of a host.
  codes: line n is how the n-th call of jdpo on a host ends: exit codes by host (the last one for all further hosts), or
    "preempt", which takes the slice away; "wait" saves when it is asked to end; "deaf" breaks the next connections.
"""

from __future__ import annotations

GCLOUD = r"""#!/bin/bash
echo "gcloud $*" >> "$CALLS"
what="$3 $4"
name=$5
for word in "$@"; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
    --output-directory=*) output=${word#*=} ;;
    --node-count=*) count=${word#*=} ;;
    --zone=*) zone=${word#*=} ;;
  esac
done
[[ $zone == us-east5-b ]] || { echo "ERROR: no zone" >&2; exit 1; }
on_host() {  # HOST WORDS...
  HOME=$CLOUD/hosts/$1 HOSTNAME=$1 bash -c "cd; $2"
}
hosts() {  # SLICE WORKER
  if [[ $2 == all ]]; then (cd "$CLOUD/hosts" && ls -d "$1"-h*); else echo "$1-h$2"; fi
}
case $what in
  'queued-resources create')
    creates=$(grep -c ' queued-resources create ' "$CALLS")
    # Always, or for the second one.
    if [[ -e $CLOUD/no_create && ( ! -s $CLOUD/no_create || $creates == 2 ) ]]; then
      echo "ERROR: quota exceeded" >&2
      exit 7
    fi
    echo "$(cat "$CLOUD/made" 2>/dev/null || echo ACTIVE)" > "$CLOUD/state"
    [[ ! -e $CLOUD/queue ]] || mv "$CLOUD/queue" "$CLOUD/states"
    slices=$name
    [[ -z ${count-} ]] || slices=$(seq -f "$name-%g" 0 $((count - 1)))
    for slice in $slices; do
      for ((i = 0; i < HOSTS; i++)); do mkdir -p "$CLOUD/hosts/$slice-h$i"; done
    done
    ;;
  'queued-resources describe')
    if [[ -s $CLOUD/states ]]; then
      head -n 1 "$CLOUD/states"
      sed -i 1d "$CLOUD/states"
    elif [[ -e $CLOUD/state ]]; then
      cat "$CLOUD/state"
    else
      echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2
      exit 1
    fi
    ;;
  'queued-resources delete') rm -rf "$CLOUD/state" "$CLOUD/hosts" ;;
  'tpu-vm describe') echo READY ;;
  'tpu-vm scp')
    target=${!#}
    words=("${@:5}")
    inputs=()
    for word in "${words[@]}"; do
      case $word in --*) ;; *:*) target=$word ;; *) inputs+=("$word") ;; esac
    done
    for host in $(hosts "${target%%:*}" all); do cp -r "${inputs[@]}" "$CLOUD/hosts/$host/${target#*:}"; done
    ;;
  'tpu-vm ssh')
    [[ $(cat "$CLOUD/state") == ACTIVE && ! -s $CLOUD/deaf ]] || {
      sed -i 1d "$CLOUD/deaf" 2>/dev/null
      echo "ERROR: no connection" >&2
      exit 255
    }
    for host in $(hosts "$name" "$worker"); do
      if [[ -n ${output-} ]]; then
        on_host "$host" "$command" > "$output/${host##*-h}.log" &
      else
        on_host "$host" "$command" || code=$?
      fi
    done
    wait
    exit "${code:-0}"
    ;;
  *) echo "ERROR: unknown command $what" >&2; exit 2 ;;
esac
"""

JDPO = r"""#!/bin/bash
echo "jdpo $* [$HOSTNAME $PWD ${HF_TOKEN-no token}]" >> "$CALLS"
echo "output of $HOSTNAME"
calls=$CLOUD/calls-$HOSTNAME
echo call >> "$calls"
read -ra codes < <(sed -n "$(wc -l < "$calls")p" "$CLOUD/codes")
code=${codes[${HOSTNAME##*-h}]-${codes[-1]-0}}
case $code in
  preempt)
    echo SUSPENDED > "$CLOUD/state"
    while [[ -e $CLOUD/hosts/$HOSTNAME ]]; do /bin/sleep 0.02; done
    ;;
  wait)
    trap 'echo saved; exit 143' TERM
    touch "$CLOUD/waits"
    while [[ ! -e $CLOUD/finish ]]; do /bin/sleep 0.05; done
    ;;
  deaf)
    printf 'x\nx\nx\nx\n' > "$CLOUD/deaf"
    # The run goes on until the connections have been tried.
    while [[ -s $CLOUD/deaf ]]; do /bin/sleep 0.02; done
    ;;
  *) exit "$code" ;;
esac
"""

SUDO = r"""#!/bin/bash
echo "sudo $*" >> "$CALLS"
[[ $1 != mount ]] || touch "$HOME/mounted"
"""

PROGRAMS = {
    "gcloud": GCLOUD,
    "jdpo": JDPO,
    "sudo": SUDO,
    "mountpoint": "#!/bin/bash\n[[ -e $HOME/mounted ]]\n",
    "mount.nfs": "#!/bin/bash\n",
    "uv": '#!/bin/bash\necho "uv $*" >> "$CALLS"\n',
    # Time passes fifty times as fast.
    "sleep": "#!/bin/bash\nexec /bin/sleep 0.02\n",
}
