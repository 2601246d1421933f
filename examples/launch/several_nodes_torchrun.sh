#!/usr/bin/env bash
# Several machines, by torchrun; by default LLaMA-2-70B with ZeRO-3. On every one of them, HOST being one of them and the same
# on all, in the root of the repository, which they share or of which each has a copy:
#   HOST=node1 examples/launch/several_nodes_torchrun.sh [RECIPE [OPTION...]]
# NODES and PROCESSES (on each of them) are 8. Their product, times micro-batch and accumulation of the recipe, is the batch.
set -euo pipefail

: "${HOST:?the name or address of one of the machines, the same on all of them}"
recipe=${1:-examples/recipes/paper-70b.yaml}
exec torchrun --nnodes "${NODES:-8}" --nproc_per_node "${PROCESSES:-8}" \
    --rdzv_backend c10d --rdzv_id "${RUN_ID:-visualchat}" --rdzv_endpoint "$HOST:${PORT:-29500}" \
    examples/train.py "$recipe" "${@:2}"
