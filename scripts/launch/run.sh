#!/usr/bin/env bash
# Runs a training command and starts it again where that helps:
#
#   run.sh python -m sft_jax.train --config ... --workdir ...
#
# Exit code 75 (stopped by a signal, state saved) and codes of processes that were killed or lost another process are started
# again, from the newest checkpoint; 0 is done; 2 (wrong input), 3 and 130 end at once. See README.md.
#
#   SFT_JAX_RESTARTS   starts after the first one, at most (default 10); 0: the launcher around this script starts again
#   SFT_JAX_BACKOFF    seconds before the first restart (default 10), doubled each time up to SFT_JAX_BACKOFF_MOST (default 300)
#   SFT_JAX_STEADY     seconds after which a start counts as a success, so that the waits begin anew (default 1800)
#   SFT_JAX_LOG        file to which the output goes too
#   SFT_JAX_PID_FILE   file for the number of this process, which then leads a process group (setsid): what end_run.sh ends
#   SFT_JAX_DEVICE, SFT_JAX_OVERLAP   see flags.sh
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/launch/flags.sh
source "$here/flags.sh"

if (($# == 0)); then
  echo "usage: run.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
restarts="${SFT_JAX_RESTARTS:-10}"
first_wait="${SFT_JAX_BACKOFF:-10}"
most_wait="${SFT_JAX_BACKOFF_MOST:-300}"
steady="${SFT_JAX_STEADY:-1800}"
[[ -z "${SFT_JAX_PID_FILE:-}" ]] || echo $$ > "$SFT_JAX_PID_FILE"
if [[ -n "${SFT_JAX_LOG:-}" ]]; then
  mkdir -p "$(dirname "$SFT_JAX_LOG")"
  exec > >(tee -a "$SFT_JAX_LOG") 2>&1
fi

stopping=0
child=0
# A signal is for the trainer: it saves and ends, and then is not started again here, since this machine is going away.
stop() {
  stopping=1
  ((child == 0)) || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'stop TERM' TERM
trap 'stop INT' INT

wait="$first_wait"
for ((start = 0; ; start++)); do
  begun=$SECONDS
  "$@" &
  child=$!
  code=0
  # A trapped signal ends `wait` before the child has ended.
  while wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do code=0; done
  child=0
  case "$code" in
    0 | 2 | 3 | 130) exit "$code" ;;
  esac
  if ((stopping)); then
    exit "$code"
  fi
  if ((start >= restarts)); then
    echo "run.sh: ended with exit code $code; not started again after $restarts restarts (SFT_JAX_RESTARTS)." >&2
    exit "$code"
  fi
  ((SECONDS - begun < steady)) || wait="$first_wait"
  echo "run.sh: ended with exit code $code; starting again in $wait s (restart $((start + 1)) of $restarts)." >&2
  sleep "$wait" &
  child=$!
  wait "$child" || true
  child=0
  if ((stopping)); then
    exit "$code"
  fi
  wait=$((wait * 2 < most_wait ? wait * 2 : most_wait))
done
