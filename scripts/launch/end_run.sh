#!/usr/bin/env bash
# Ends a run of run.sh on this machine that has lost the connection it was started through, and may still hold the accelerators:
#
#   end_run.sh PID_FILE            what SFT_JAX_PID_FILE named for that run, which was started with setsid
#
#   SFT_JAX_END_WAIT   seconds from SIGTERM, upon which the trainer saves, to SIGKILL (default 120)
set -euo pipefail

if (($# != 1)); then
  echo "usage: end_run.sh PID_FILE" >&2
  exit 2
fi
[[ -s "$1" ]] || exit 0
group="$(cat "$1")"

# The processes of the group; none of a program that got the number after the run had ended.
left() { pgrep --pgroup "$group" --full sft_jax || true; }

pids="$(left)"
if [[ -n "$pids" ]]; then
  echo "end_run.sh: an earlier run is still there (process group $group); ending it." >&2
  # To run.sh alone, which hands it on: a second signal would end the trainer before it has saved. Where run.sh is gone, to all.
  if [[ " ${pids//$'\n'/ } " == *" $group "* ]]; then kill -s TERM "$group" || true; else kill -s TERM -- "-$group" || true; fi
  for ((second = 0; second < ${SFT_JAX_END_WAIT:-120}; second++)); do
    [[ -n "$(left)" ]] || break
    sleep 1
  done
  if [[ -n "$(left)" ]]; then
    kill -s KILL -- "-$group" || true
    sleep 1
  fi
  if [[ -n "$(left)" ]]; then
    echo "end_run.sh: process group $group does not end." >&2
    exit 1
  fi
fi
rm -f "$1"
