"""Kernels to be tested: for this machine, and for older ones."""

import ctypes
import platform

import pytest

from cluster.kernels.library import native_library

OLDER = ("x86-64-v3", "x86-64")


@pytest.fixture(scope="session", params=["native", *OLDER])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The kernels for this machine, and for older ones: sixteen numbers are one vector, two or four."""
    if request.param != "native" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{request.param} does not run on {platform.machine()}")
    library = native_library(request.param)
    assert library is not None, "the machine that tests has a C++ compiler"
    return library
