"""Settings of the whole suite."""

import os


# Tensors of some hundred numbers: threads wait for each other many times longer than they compute, and processes that a test
# starts compute as it does itself
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else tokenizers warn in processes that are forked later
