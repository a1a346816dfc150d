# shellcheck shell=bash
# Sourced before a main is run: settings of XLA and JAX for each platform. A
# variable that is set already stays as it is. This is the one place for them.
#
# TPU: none. https://openxla.org/xla/flags_guidance lists what can be tried, in
#   LIBTPU_INIT_ARGS; what it suggests for overlapping collectives on v5e is the
#   default by now. We have measured none of them.
# GPU: NVIDIA sets the flag below in its own images for JAX
#   (https://docs.nvidia.com/jax-toolbox/environment-variables): collectives
#   run beside the computation. By itself JAX takes 75% of a GPU's memory
#   (https://docs.jax.dev/en/latest/gpu_memory_allocation.html); the variants
#   for 24 and 80 GB need up to 85%. Neither is measured by us.
# Compiled programs: kept beside the workdirs of a bucket, so that a new machine
#   need not compile what another has compiled
#   (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). Whoever
#   may write there can run code here.
if head -n 1 .venv/installed 2>/dev/null | grep -q cuda; then
  export XLA_FLAGS=${XLA_FLAGS---xla_gpu_enable_latency_hiding_scheduler=true}
  fraction=${XLA_PYTHON_CLIENT_MEM_FRACTION-.92}
  export XLA_PYTHON_CLIENT_MEM_FRACTION=$fraction
fi
for argument in "$@"; do
  case $argument in
    --workdir=gs://*/*)
      workdir=${argument#*=}
      workdir=${workdir%/}
      compiled=${workdir%/*}/compiled
      export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$compiled}
      ;;
  esac
done
