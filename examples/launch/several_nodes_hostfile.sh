#!/usr/bin/env bash
# Trains on several machines with DeepSpeed's launcher, which connects to them by ssh and needs pdsh. The default recipe is
# LLaMA-2-70B with ZeRO-3. Run it on one machine, from the root of the repository, whose path must be the same on all machines:
#   HOSTFILE=my_hosts examples/launch/several_nodes_hostfile.sh [RECIPE [OPTION...]]
set -euo pipefail

recipe=${1:-examples/recipes/paper-70b.yaml}
exec deepspeed --hostfile "${HOSTFILE:-examples/launch/hostfile}" --master_port "${PORT:-29500}" --no_local_rank \
    examples/train.py "$recipe" "${@:2}"
