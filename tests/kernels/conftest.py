"""What tests of the kernels share."""

from __future__ import annotations

from pathlib import Path

import pytest

from paredown.kernels import native


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the library of CPU kernels; a skip where it was not built."""
    if reason := native.problem():
        pytest.skip(f"no library of CPU kernels: {reason}")
    return native.ort_library()
