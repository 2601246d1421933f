#!/usr/bin/env bash
# Trains on one machine, with one process per GPU. Run it from the root of the repository:
#   examples/launch/one_node.sh [RECIPE [OPTION...]]
#   PROCESSES=2 examples/launch/one_node.sh examples/recipes/tiny.yaml --max_steps 4
set -euo pipefail

recipe=${1:-examples/recipes/paper-7b.yaml}
exec torchrun --standalone --nproc_per_node "${PROCESSES:-8}" examples/train.py "$recipe" "${@:2}"
