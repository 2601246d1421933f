#!/usr/bin/env bash
# Trains on several machines with torchrun. The default recipe is LLaMA-2-70B with ZeRO-3. Run it on each machine, from the
# root of the repository (a shared folder or a copy). HOST is the name of one of the machines, the same on all:
#   HOST=node1 examples/launch/several_nodes_torchrun.sh [RECIPE [OPTION...]]
# NODES (machines) and PROCESSES (per machine) are 8 by default. The batch size is NODES × PROCESSES × the recipe's
# per_device_train_batch_size × gradient_accumulation_steps.
set -euo pipefail

: "${HOST:?the name or address of one of the machines, the same on all of them}"
recipe=${1:-examples/recipes/paper-70b.yaml}
exec torchrun --nnodes "${NODES:-8}" --nproc_per_node "${PROCESSES:-8}" \
    --rdzv_backend c10d --rdzv_id "${RUN_ID:-visualchat}" --rdzv_endpoint "$HOST:${PORT:-29500}" \
    examples/train.py "$recipe" "${@:2}"
