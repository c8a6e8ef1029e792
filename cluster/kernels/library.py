"""Builds the native kernels on first use and loads them. Knows nothing of models.

One shared library per source, compiler and processor, kept in the user's cache folder: it is built for the very
instructions of this machine, which takes a few seconds, once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cluster.environment import cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
_BUILD_TIMEOUT_S = 300
PAGE_BYTES = 2 * 2**20
"""Of a large page."""
_LINE_BYTES = 64


class Matrix(ctypes.Structure):
    """Packed weights of a product; field by field as in the C++ sources, like all below."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("format", c_int64),
    )


class HeadWeights(ctypes.Structure):
    """What queries and keys go through before they meet; null leaves a step out."""

    _fields_ = (("q_norm", c_void_p), ("k_norm", c_void_p), ("cosines", c_void_p), ("sines", c_void_p))


class Cache(ctypes.Structure):
    """Keys and values of one layer."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p))


class Block(ctypes.Structure):
    """One decoder block."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("feed_forward_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("heads", HeadWeights),
        ("cache", Cache),
    )


class Heads(ctypes.Structure):
    """How attention is divided."""

    _fields_ = (
        ("queries", c_int64),
        ("keys", c_int64),
        ("size", c_int64),
        ("rounded", c_int64),
        ("scaling", c_float),
        ("epsilon", c_float),
    )


class Model(ctypes.Structure):
    """A whole decoder, but for its embeddings."""

    _fields_ = (
        ("num_blocks", c_int64),
        ("hidden", c_int64),
        ("between", c_int64),
        ("activation", c_int64),
        ("norm_epsilon", c_float),
        ("unused", c_float),
        ("heads", Heads),
        ("blocks", ctypes.POINTER(Block)),
        ("last_norm", c_void_p),
        ("head", Matrix),
    )


class Tokens(ctypes.Structure):
    """Where the tokens of a step stand."""

    _fields_ = (
        ("count", c_int64),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("table", c_void_p),
        ("table_width", c_int64),
    )


class Mixtures(ctypes.Structure):
    """Which rows of a step meet which adapters, with which weights."""

    _fields_ = (
        ("num_adapters", c_int64),
        ("adapters", c_void_p),
        ("row_starts", c_void_p),
        ("rows", c_void_p),
        ("weights", c_void_p),
    )


class Step(ctypes.Structure):
    """Everything that changes from step to step."""

    _fields_ = (
        ("tokens", Tokens),
        ("x", c_void_p),
        ("mixtures", Mixtures),
        ("read_from", c_void_p),
        ("num_logits", c_int64),
        ("logits", c_void_p),
    )


class Prototypes(ctypes.Structure):
    """The rows of every domain of a router, in fixed point."""

    _fields_ = (("rows", c_void_p), ("starts", c_void_p), ("groups", c_int64), ("width", c_int64))


class FeedForward(ctypes.Structure):
    """Two linear layers with a GELU between them."""

    _fields_ = (
        ("first", c_void_p),
        ("first_bias", c_void_p),
        ("second", c_void_p),
        ("second_bias", c_void_p),
        ("inputs", c_int64),
        ("hidden", c_int64),
        ("outputs", c_int64),
    )


class Votes(ctypes.Structure):
    """What a router's counts say of domains."""

    _fields_ = (
        ("numbers", c_void_p),
        ("starts", c_void_p),
        ("domains", c_void_p),
        ("weights", c_void_p),
        ("vectors", c_void_p),
        ("block", FeedForward),
        ("num_domains", c_int64),
    )


class TextEncoder(ctypes.Structure):
    """What a router makes of n-grams."""

    _fields_ = (
        ("lexicon", c_void_p),
        ("rarities", c_void_p),
        ("table", c_void_p),
        ("block", FeedForward),
        ("word_numbers", c_void_p),
        ("word_vectors", c_void_p),
        ("words_block", FeedForward),
        ("words_gain", c_float),
        ("unused", c_float),
        ("directions", c_void_p),
        ("shares", c_void_p),
        ("votes", Votes),
        ("num_rows", c_int64),
        ("width", c_int64),
        ("num_directions", c_int64),
        ("sketch_width", c_int64),
    )


class RouterHead(ctypes.Structure):
    """What a router makes of that: logits."""

    _fields_ = (
        ("none", FeedForward),
        ("none_offset", c_void_p),
        ("offsets", c_void_p),
        ("temperature", c_void_p),
        ("prototypes", Prototypes),
        ("scale", c_float),
        ("unused", c_float),
    )


class Texts(ctypes.Structure):
    """The features of several texts."""

    _fields_ = (("slots", c_void_p), ("kinds", c_void_p), ("starts", c_void_p), ("count", c_int64))


class AttentionShape(ctypes.Structure):
    """Heads in training."""

    _fields_ = (("queries", c_int64), ("keys", c_int64), ("size", c_int64), ("scaling", c_float))


@cache
def native_library(architecture: str = "native") -> ctypes.CDLL | None:
    """The kernels, built if need be; None where there is no compiler, or none that can: then torch does the work.

    `architecture` is the compiler's name of the instructions to build for; "native", for all that this machine has.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        logger.warning(
            "No C++ compiler (g++ or clang++) was found: the engine runs in torch, at a fraction of the speed."
        )
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler, architecture)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None)
        logger.warning("The native kernels could not be built; the engine runs in torch, slower. %s", output or error)
        return None
    library.zephyra_run.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Step), c_int64, c_int)
    library.zephyra_pack.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int)
    library.zephyra_rows.argtypes = (ctypes.POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64, c_int)
    library.zephyra_product.argtypes = (c_void_p, c_int64, ctypes.POINTER(Matrix), c_void_p, c_int, c_int64, c_int)
    library.zephyra_log_means.argtypes = (c_void_p, c_int64, ctypes.POINTER(Prototypes), c_float, c_void_p)
    router = (ctypes.POINTER(TextEncoder), ctypes.POINTER(RouterHead), ctypes.POINTER(Texts))
    library.zephyra_text_logits.argtypes = (*router, c_void_p)
    library.zephyra_prefer_large_pages.argtypes = (c_void_p, c_size_t)
    shape = ctypes.POINTER(AttentionShape)
    library.zephyra_attend.argtypes = (shape, *[c_void_p] * 4, c_int64, *[c_void_p] * 2, c_int)
    library.zephyra_attend_back.argtypes = (shape, *[c_void_p] * 4, c_int64, *[c_void_p] * 6, c_int)
    library.zephyra_normalize.argtypes = (*[c_void_p] * 2, c_int64, c_int64, c_float, c_void_p, c_int)
    library.zephyra_normalize_back.argtypes = (*[c_void_p] * 3, c_int64, c_int64, c_float, c_void_p, c_int)
    for name in (
        *("run", "pack", "rows", "product", "log_means", "text_logits", "prefer_large_pages"),
        *("attend", "attend_back", "normalize", "normalize_back"),
    ):
        getattr(library, f"zephyra_{name}").restype = None
    library.zephyra_is_paired.argtypes = (c_int,)
    library.zephyra_is_paired.restype = c_int
    return library


class LargePages:
    """Memory in large pages, where there are any, for what is read from end to end and freed together."""

    def __init__(self, library: ctypes.CDLL, chunk_bytes: int = 64 * 2**20) -> None:
        """Takes `chunk_bytes` from the system at a time; what nobody writes to costs nothing."""
        self.num_bytes = 0
        """Handed out."""
        self._library = library
        self._chunk_bytes = chunk_bytes
        self._chunks: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Uninitialised memory, uint8 [num_bytes], beginning with a cache line."""
        padded_bytes = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        if padded_bytes > len(self._left):
            size = max(self._chunk_bytes, padded_bytes)
            chunk = torch.empty(size + PAGE_BYTES, dtype=torch.uint8)
            start = -chunk.data_ptr() % PAGE_BYTES
            self._left = chunk[start : start + size]
            self._chunks.append(chunk)
            self._library.zephyra_prefer_large_pages(self._left.data_ptr(), size)
        taken, self._left = self._left[:num_bytes], self._left[padded_bytes:]
        self.num_bytes += num_bytes
        return taken


def _built(compiler: str, architecture: str) -> Path:
    flags = (*_FLAGS, f"-march={architecture}")
    digest = hashlib.sha256(repr((_version(compiler), flags, _processor(), torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = cache_folder() / "kernels"
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger.info("Building the native kernels for this machine, once; a few seconds.")
    # Two processes may build at once: each renames its own into place, and they are the same.
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        compiled, linked = Path(draft) / "step.o", Path(draft) / library.name
        _run(compiler, *flags, "-fopenmp", "-c", str(SOURCES / "step.cpp"), "-o", str(compiled))
        # Linked without OpenMP's library: the one that torch has loaded serves both, with one pool of threads.
        _run(compiler, "-shared", str(compiled), "-o", str(linked))
        os.replace(linked, library)
    return library


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    return done.stdout


def _version(compiler: str) -> str:
    return _run(compiler, "--version")


def _processor() -> str:
    """What decides which instructions there are: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
