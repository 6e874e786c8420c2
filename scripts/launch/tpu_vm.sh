#!/usr/bin/env bash
# Trains on a Cloud TPU slice that it requests through queued resources, and again on a new one where a spot slice was preempted.
#
#   scripts/launch/tpu_vm.sh --name NAME --zone ZONE --type v5litepod-16 --workdir gs://BUCKET/RUN [--spot] [OPTION ...] -- ARGUMENTS
#
# ARGUMENTS are those of sft_jax.train, without --workdir. See tpu_vm.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_vm.sh --name NAME --zone ZONE --type ACCELERATOR_TYPE --workdir gs://BUCKET/RUN [OPTION ...] -- ARGUMENTS OF sft_jax.train

  --name NAME        of the queued resource and of its TPU node
  --type TYPE        such as v5litepod-16, v5p-32, v6e-16
  --workdir URL      folder of the run: what is left when a slice goes away
  --version VERSION  runtime of the VMs (default: by type)
  --project PROJECT  (default: that of gcloud)
  --slices N         slices of a multislice run (default 1)
  --spot             spot capacity, requested again after a preemption
  --reserved         capacity of the project's reservation
  --restarts N       requests after the first one, at most (default 20)
  --wait SECONDS     between two looks at the request, and at the slice (default 60)
  --keep             do not delete the slice at the end
  --source DIR       checkout that is copied to the VMs (default: this one)
TEXT
}

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') $*" >&2; }
die() {
  echo "error: $*" >&2
  exit 2
}

name='' zone='' type='' workdir='' version='' project='' slices=1 capacity=() restarts=20 every=60 keep=0
source="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
while (($#)); do
  case "$1" in
    --name | --zone | --type | --workdir | --version | --project | --slices | --restarts | --wait | --source)
      (($# > 1)) || die "$1: needs a value."
      case "$1" in
        --name) name="$2" ;; --zone) zone="$2" ;; --type) type="$2" ;; --workdir) workdir="$2" ;;
        --version) version="$2" ;; --project) project="$2" ;; --slices) slices="$2" ;;
        --restarts) restarts="$2" ;; --wait) every="$2" ;; --source) source="$2" ;;
      esac
      shift 2
      ;;
    --spot | --reserved) capacity+=("$1") && shift ;;
    --keep) keep=1 && shift ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) usage >&2 && die "'$1' is not an option; arguments of the trainer go behind --." ;;
  esac
done
for option in name zone type workdir; do
  [[ -n "${!option}" ]] || die "--$option: is missing (tpu_vm.sh --help)."
done
(($#)) || die "the arguments of sft_jax.train are missing; write them behind --."
[[ "$workdir" == gs://* ]] || die "--workdir: must be gs://BUCKET/RUN, since the disks of the VMs go with the slice, not '$workdir'."
((${#capacity[@]} < 2)) || die "--spot, --reserved: name one of them."
[[ -f "$source/pyproject.toml" ]] || die "--source: $source is no checkout of sft_jax."
command -v gcloud >/dev/null || die "gcloud is not installed."
if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    *) die "--type: '$type' has no known runtime; name it with --version." ;;
  esac
fi
place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")

scratch="$(mktemp -d)"

tpus() { gcloud compute tpus "$@" "${place[@]}" --quiet </dev/null; } # ssh would read what is meant for the loop around it
complaint() { [[ ! -s "$scratch/errors" ]] || tail -n 1 "$scratch/errors"; } # of gcloud, where its errors were kept
nodes() { # the TPU nodes of the request: NAME, or NAME-0, NAME-1, ... of several slices
  if ((slices == 1)); then echo "$name"; else for ((i = 0; i < slices; i++)); do echo "$name-$i"; done; fi
}

# Prints the state of the request: ABSENT where there is none, UNKNOWN where gcloud failed (network, login) as often as it was asked.
state() {
  local found try
  for ((try = 1; try <= 10; try++)); do
    if found="$(tpus queued-resources describe "$name" --format='value(state.state)' 2>"$scratch/errors")"; then
      echo "${found:-UNKNOWN}" && return
    elif grep --quiet NOT_FOUND "$scratch/errors"; then
      echo ABSENT && return
    fi
    say "request $name: cannot be looked at ($(complaint)); try $try of 10"
    ((try == 10)) || sleep "$every"
  done
  echo UNKNOWN
}

# Requests the slice. What no later try would mend ends the script, where it is the first thing that was asked.
request() {
  local node=(--node-id="$name") code=0
  ((slices == 1)) || node=(--node-prefix="$name" --node-count="$slices")
  tpus queued-resources create "$name" "${node[@]}" --accelerator-type="$type" --runtime-version="$version" "${capacity[@]}" 2>"$scratch/errors" || code=$?
  cat "$scratch/errors" >&2
  if ((code && start == 0)) && grep --quiet --extended-regexp 'INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED' "$scratch/errors"; then
    die "the slice cannot be requested: $(complaint)"
  fi
  return "$code"
}

# Deletes the request and its slice. One that is not there is no error.
release() {
  tpus queued-resources delete "$name" --force 2>"$scratch/errors" || grep --quiet NOT_FOUND "$scratch/errors" || {
    say "request $name: cannot be deleted ($(complaint))"
    return 1
  }
}

# Waits until the slice is there. Returns 1 where the request has ended without one.
wait_for_slice() {
  local found
  while :; do
    found="$(state)"
    case "$found" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | ABSENT | UNKNOWN) say "request $name: $found" && return 1 ;;
      *) say "request $name: $found" && sleep "$every" ;;
    esac
  done
}

# Runs a command on all VMs of a node; the output of each goes to the terminal. A connection that says nothing for ten minutes ends.
on_all() { tpus tpu-vm ssh "$1" --worker=all --ssh-flag=-oServerAliveInterval=60 --ssh-flag=-oServerAliveCountMax=10 --command="$2"; }

files() { # of the checkout, NUL after each: what git would take, or all but environments and runs where it is no repository
  if git -C "$source" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git -C "$source" ls-files -z --cached --others --exclude-standard --deduplicate
  else
    (cd "$source" && find . \( -name '.venv*' -o -name .git -o -path ./runs \) -prune -o -type f -print0)
  fi | while IFS= read -r -d '' file; do
    [[ ! -e "$source/$file" ]] || printf '%s\0' "$file" # one that is deleted but not committed is left out
  done
}

# Brings the checkout to all hosts, ends a run there that has lost its connection, and makes the environment. Called in a condition,
# where `set -e` does nothing: each step says itself that it has failed.
install() {
  local node
  files | tar --create --gzip --file="$scratch/sft_jax.tar.gz" --directory="$source" --null --files-from=- || return
  for node in $(nodes); do
    tpus tpu-vm scp "$scratch/sft_jax.tar.gz" "$node:sft_jax.tar.gz" --worker=all || return
    on_all "$node" 'set -e; mkdir -p sft_jax; tar --extract --gzip --file=sft_jax.tar.gz --directory=sft_jax
      sft_jax/scripts/launch/end_run.sh ~/sft_jax.pid; sft_jax/scripts/launch/environment.sh tpu,remote' || return
  done
}

# Trains on all slices at once. run.sh restarts on the VMs what ended there by itself; a VM that goes away ends the connection.
train() {
  local command node pids=() code=0 pid variable
  command="cd sft_jax && SFT_JAX_DEVICE=tpu SFT_JAX_LOG=\$HOME/train.log SFT_JAX_PID_FILE=\$HOME/sft_jax.pid"
  for variable in LIBTPU_INIT_ARGS SFT_JAX_OVERLAP SFT_JAX_RESTARTS HF_TOKEN WANDB_API_KEY; do
    [[ -z "${!variable:-}" ]] || printf -v command '%s %s=%q' "$command" "$variable" "${!variable}"
  done
  printf -v command '%s setsid --wait scripts/launch/run.sh %s' "$command" "$(printf '%q ' .venv/bin/python -m sft_jax.train "$@" --workdir "$workdir")"
  for node in $(nodes); do
    on_all "$node" "$command" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || code=$?
  done
  return "$code"
}

cleanup() {
  local code=$? delete="gcloud compute tpus queued-resources delete $name ${place[*]} --force" try
  trap - EXIT
  if ((keep)); then
    say "request $name is kept; delete it with: $delete"
  else
    for ((try = 1; try <= 5; try++)); do
      release && break
      ((try < 5)) || { say "request $name is still there and costs money; delete it with: $delete" && break; }
      sleep "$every"
    done
  fi
  rm -rf "$scratch"
  exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# One try: request, wait, install, train. Returns the exit code of the training, or 1 where it did not come to that.
try_once() {
  [[ "$(state)" != ABSENT ]] || request || return 1
  wait_for_slice || return 1
  say "slice $name is there (start $((start + 1))); installing"
  install || { say "slice $name: installing failed" && return 1; }
  train "$@"
}

pause="$every"
for ((start = 0; ; start++)); do
  code=0
  try_once "$@" || code=$?
  case "$code" in
    0) say "done: $workdir" && exit 0 ;;
    2 | 3) exit "$code" ;;
  esac
  ((start < restarts)) || { say "ended with exit code $code; not requested again after $restarts restarts (--restarts)." && exit "$code"; }
  found="$(state)"
  say "ended with exit code $code; request state $found. Requesting again in $pause s (restart $((start + 1)) of $restarts)."
  # A slice that is still there is used again; one that was preempted must be deleted before it can be requested. Where that fails
  # the next try finds it as it is, and comes back here.
  [[ ! "$found" =~ ^(FAILED|SUSPENDED|SUSPENDING)$ ]] || release || true
  sleep "$pause"
  pause=$((pause * 2 < 1800 ? pause * 2 : 1800))
done
