# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""`python -m visualchat` is `visualchat`."""

import sys

from visualchat.cli import main


sys.exit(main())
