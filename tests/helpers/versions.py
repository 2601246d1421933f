"""Tests of what older versions of transformers do not have."""

import pytest
import transformers
from packaging.version import Version


def needs_transformers(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test where transformers is older, since it lacks what `reason` says."""
    is_older = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(is_older, reason=f"transformers {version} or later: {reason}")
