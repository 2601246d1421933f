"""
Runs a script on CPU processes as `accelerate launch` runs it on accelerators. accelerate 1.15 gives FSDP to accelerators
alone, and on CPU processes replicates the model without a word:

    accelerate launch --config_file examples/fsdp/fsdp2.yaml --num_processes 2 tests/helpers/fsdp_on_cpu.py SCRIPT ARGUMENTS
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


initialize = AcceleratorState.__init__


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = initialize_with_fsdp
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
