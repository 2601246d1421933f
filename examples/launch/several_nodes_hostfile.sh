#!/usr/bin/env bash
# Several machines, by DeepSpeed's launcher, which reaches them through ssh (it needs pdsh); by default LLaMA-2-70B with ZeRO-3.
# On one machine, in the root of the repository, which all of them find under the same path:
#   HOSTFILE=my_hosts examples/launch/several_nodes_hostfile.sh [RECIPE [OPTION...]]
set -euo pipefail

recipe=${1:-examples/recipes/paper-70b.yaml}
exec deepspeed --hostfile "${HOSTFILE:-examples/launch/hostfile}" --master_port "${PORT:-29500}" --no_local_rank \
    examples/train.py "$recipe" "${@:2}"
