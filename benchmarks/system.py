"""The model that is timed, and engines around it: what every scenario starts from."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import decoders
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from benchmarks.client import AdapterLibrary, Client, Played
from benchmarks.workload import MixtureOf, Workload
from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine
from cluster.errors import InvalidInput
from cluster.messages import AdapterRef, Mixture
from cluster.model.base import Base, fingerprint, load_base

MAX_BATCH_SIZE = 16
MAX_WAITING = 1024
_CONTEXT_TOKENS = 512
_BANDWIDTH_BYTES = 2**29
"""Beyond any cache."""


@dataclass(frozen=True, slots=True)
class TimedModel:
    """A folder with a base in `base` and adapters in `lora0`, `lora1`, ..., to be run in bf16."""

    folder: Path
    device: str = "cpu"
    """As torch names it."""

    def check(self, least_adapters: int) -> None:
        """Raise `InvalidInput` unless there is a base with at least so many adapters."""
        if not (self.base_folder / "config.json").is_file():
            raise InvalidInput(
                f"There is no base/config.json in {self.folder}; write a model to be timed with "
                "`python -m benchmarks.random_model OUT`."
            )
        if self.num_adapters < least_adapters:
            raise InvalidInput(
                f"{self.folder} holds {self.num_adapters} adapters (lora0, lora1, ...); the scenarios need "
                f"{least_adapters}: write a model with `python -m benchmarks.random_model OUT --adapters 16`, or name "
                "other scenarios with --only."
            )

    @property
    def base_folder(self) -> Path:
        return self.folder / "base"

    @property
    def num_adapters(self) -> int:
        number = 0
        while (self.folder / f"lora{number}" / "adapter_config.json").is_file():
            number += 1
        return number

    def library(self, num_domains: int) -> AdapterLibrary:
        """So many domains; beyond the adapters there are, copies under other names."""
        num_adapters = self.num_adapters
        folders = {domain(i): self.folder / f"lora{i % num_adapters}" for i in range(num_domains)}
        return AdapterLibrary(folders, _fingerprint(self.base_folder), torch.bfloat16)

    def adapter_bytes(self) -> int:
        """Of one adapter in memory; all are alike."""
        return self.library(1).load(domain(0)).num_bytes


@cache
def _fingerprint(folder: Path) -> str:
    return fingerprint(folder)


def domain(number: int) -> AdapterRef:
    return AdapterRef(f"domain{number}", 1)


def plain(index: int) -> Mixture:
    """The base alone, whatever the request."""
    return Mixture()


def in_turn(num_domains: int, num_mixed: int = 1) -> MixtureOf:
    """Domains in turn; of several, the first has half of the weight and the others the rest in equal shares."""
    rest = 0.5 / max(1, num_mixed - 1)

    def mixture_of(index: int) -> Mixture:
        others = {domain((index + i) % num_domains): rest for i in range(1, num_mixed)}
        return Mixture.of({**others, domain(index % num_domains): 0.5 if others else 1.0})

    return mixture_of


@dataclass(frozen=True, slots=True)
class Size:
    """How much an engine may hold."""

    num_slots: int
    """Adapters in its slot bank."""
    num_domains: int | None = None
    """That requests can be for; by default as many as there are slots."""
    num_contexts: int = MAX_BATCH_SIZE
    """Sequences of the greatest length in its KV cache."""


class System:
    """One engine with a base of its own, its client and its workload."""

    def __init__(self, base: Base, library: AdapterLibrary, settings: EngineSettings, new_tokens: int) -> None:
        give_every_id_a_text(base.tokenizer, int(base.model.config.vocab_size))
        self.engine = Engine(base, settings)
        self.client = Client(self.engine, library)
        self.workload = Workload(base.tokenizer, new_tokens)

    def play(self, num_requests: int, mixture_of: MixtureOf) -> Played:
        """So many requests at once, from prompts not seen before."""
        return self.client.play(self.workload.requests(num_requests, mixture_of), in_flight=num_requests)


@contextmanager
def opened(model: TimedModel, base_folder: Path, size: Size, new_tokens: int) -> Iterator[System]:
    """An engine of this size on the base in `base_folder`, which is the model's own or made of it."""
    base = load_base(base_folder, torch.bfloat16, model.device)
    settings = EngineSettings(
        max_batch_size=MAX_BATCH_SIZE,
        max_waiting=MAX_WAITING,
        max_context_tokens=_CONTEXT_TOKENS,
        kv_cache_bytes=size.num_contexts * _CONTEXT_TOKENS * _kv_bytes_per_token(base.model.config),
        # Half a slot more: in an engine's own layout an adapter takes a little more than its tensors.
        adapter_bytes=int((size.num_slots + 0.5) * model.adapter_bytes()),
        reuse_prefixes=False,
    )
    system = System(base, model.library(size.num_domains or size.num_slots), settings, new_tokens)
    try:
        yield system
    finally:
        system.client.close()
        del system, base
        gc.collect()


def _kv_bytes_per_token(config: PretrainedConfig) -> int:
    """Keys and values of one token in all layers, in bf16."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size)


def give_every_id_a_text(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Let each id of the model be some text by itself: those that the tokenizer lacks, and pieces of a character.

    A random model writes any of them, and text that is not yet certain is held back: first tokens would be seen late.
    """
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([f"<unused{number}>" for number in range(len(tokenizer), vocab_size)])


def num_cores() -> int:
    return os.cpu_count() or 1


def read_bandwidth(device: str = "cpu") -> float:
    """Bytes per second at which all threads together sum a large array: the best of several passes."""
    array = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    float(array.sum())
    times_s = []
    for _ in range(7):
        start_s = time.perf_counter()
        float(array.sum())
        times_s.append(time.perf_counter() - start_s)
    return array.nbytes / min(times_s)
