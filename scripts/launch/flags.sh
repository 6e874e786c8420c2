# shellcheck shell=bash
# Flags of XLA that let transfers between devices and arithmetic overlap; sourced by the launchers. README.md says what each does.
#
#   SFT_JAX_DEVICE    tpu, gpu, or cpu (nothing is set)
#   SFT_JAX_OVERLAP   0: no flag is set
#
# What is in LIBTPU_INIT_ARGS or XLA_FLAGS already wins: a flag that is named there is not set again. A flag that the installed
# library does not know ends the process at its start, so tests/launch/test_scripts.py starts jaxlib and libtpu with them.

# Those of TPUs lie in the package, where plans read them: a step is planned as it will be compiled.
mapfile -t sft_jax_tpu_flags < "$(dirname "${BASH_SOURCE[0]}")/../../sft_jax/planning/tpu_flags.txt"
sft_jax_gpu_flags=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_enable_highest_priority_async_stream=true
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
)

# Prints the flags of $1 (what the user has set) and those of the rest whose names are not among them.
sft_jax_join_flags() {
  local set="$1" flag
  shift
  for flag in "$@"; do
    [[ " $set " == *" ${flag%%=*}="* || " $set " == *" ${flag%%=*} "* ]] || set="$set $flag"
  done
  printf '%s' "${set# }"
}

if [[ "${SFT_JAX_OVERLAP:-1}" != 0 ]]; then
  case "${SFT_JAX_DEVICE:-cpu}" in
    tpu) LIBTPU_INIT_ARGS="$(sft_jax_join_flags "${LIBTPU_INIT_ARGS:-}" "${sft_jax_tpu_flags[@]}")" && export LIBTPU_INIT_ARGS ;;
    gpu) XLA_FLAGS="$(sft_jax_join_flags "${XLA_FLAGS:-}" "${sft_jax_gpu_flags[@]}")" && export XLA_FLAGS ;;
    cpu) ;;
    *) echo "SFT_JAX_DEVICE: must be tpu, gpu or cpu, not '$SFT_JAX_DEVICE'." >&2 && exit 2 ;;
  esac
fi
