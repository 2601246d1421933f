"""
`visualchat train` as a file, for launchers that want one:

    torchrun --nproc_per_node 8 examples/train.py examples/recipes/paper-7b.yaml
"""

import sys

from visualchat.cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
