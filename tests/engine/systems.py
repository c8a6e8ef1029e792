"""Small random systems for the engine's tests: bases of five architectures, adapters, mixtures, and the slow
reference, which merges a mixture into a copy of the base's weights and calls `generate`.
"""

import copy
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine, StepOutput, max_tokens_of
from cluster.engine.native_runner import native_runner
from cluster.engine.runner import Runner
from cluster.engine.scheduler import Chunk
from cluster.engine.torch_runner import TorchRunner
from cluster.errors import ZephyraError
from cluster.kernels.decoder import kv_block_bytes
from cluster.lora.delta import dense_delta
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.messages import AdapterRef, FinishReason, GenerateRequest, Mixture, SamplingParams, TokenLogprob
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import Base, encode_prompt
from cluster.model.tokenizer import train_tokenizer

KINDS = ("zephyra", "llama", "qwen2", "qwen3", "smollm3")
RUNNERS = ("native", "torch")
CONTEXT_TOKENS = 160
FINGERPRINT = "0123456789abcdef"
LONGEST_ANSWER = 36
"""Tokens that the reference generates at least."""
MARGIN = 2e-4
"""A decision closer than this may fall either way."""

PROMPTS = (
    "one",
    "What is the capital of France?",
    "Rechne 12 km in m um, bitte.",
    "数字を書いてください 😀",
    "select name from users where id = 7 order by name limit 3",
    "a",
)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([*PROMPTS, "the quick brown fox jumps over the lazy dog. " * 3], 340, CONTEXT_TOKENS)


@cache
def _model(kind: str) -> PreTrainedModel:
    torch.set_num_threads(1)
    torch.manual_seed(KINDS.index(kind))
    shape = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": CONTEXT_TOKENS,
    }
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "zephyra": lambda: ZephyraFusionForCausalLM(ZephyraFusionConfig(**shape)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape)),
        "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**shape, pad_token_id=0, no_rope_layer_interval=2)),
    }
    model = makers[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.5 if "embed" in name or "lm_head" in name else 0.1)
    return model.eval().requires_grad_(False)


def make_base(kind: str = "zephyra", dtype: torch.dtype = torch.float32) -> Base:
    """A fresh copy of the base of this kind: an engine takes its model over."""
    return Base(torch.nn.Module.to(copy.deepcopy(_model(kind)), dtype), tokenizer(), FINGERPRINT, kind)


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, 1)


def make_adapter(
    model: PreTrainedModel, seed: int, rank: int, scale: float = 0.5, only: str = "", std: float = 0.2
) -> AdapterWeights:
    """Random factors of both matrices for every layer whose name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in adaptable_layers(model).items():
        a_RI = torch.randn(rank, layer.in_features, generator=generator) * std
        b_OR = torch.randn(layer.out_features, rank, generator=generator) * std
        if only in name:
            factors[name] = Factors(a_RI, b_OR, scale)
    return AdapterWeights(factors, FINGERPRINT)


@cache
def adapters(kind: str = "zephyra") -> dict[AdapterRef, AdapterWeights]:
    """Of different ranks; two change only some layers."""
    model = _model(kind)
    return {
        ref("law"): make_adapter(model, 1, rank=4),
        ref("sql"): make_adapter(model, 2, rank=1, scale=2.0),
        ref("math"): make_adapter(model, 3, rank=8, only="mlp"),
        ref("poetry"): make_adapter(model, 4, rank=2, only="layers.1.self_attn"),
        ref("chess"): make_adapter(model, 5, rank=3, only="q_proj", scale=-1.0),
    }


MIXTURES = (
    Mixture(),
    Mixture.of({ref("law"): 1.0}),
    Mixture.of({ref("sql"): 0.75}),
    Mixture.of({ref("poetry"): 1.5}),
    Mixture.of({ref("chess"): 1.0}),
    Mixture.of({ref("law"): 0.5, ref("math"): 0.5}),
    Mixture.of({ref("law"): 0.25, ref("sql"): 0.5, ref("math"): 0.25}),
    Mixture.of({ref("law"): 0.25, ref("sql"): 0.25, ref("math"): 0.25, ref("poetry"): 0.25}),
)


def request(
    request_id: str, prompt: str = PROMPTS[1], mixture: Mixture = MIXTURES[0], **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(request_id, prompt, mixture, SamplingParams(**{"max_tokens": 8, **sampling}))


@cache
def _prepared_bytes(kind: str, runner: str) -> dict[AdapterRef, int]:
    made = make_runner(runner, make_base(kind), EngineSettings())
    return {r: made.prepare(weights).num_bytes for r, weights in adapters(kind).items()}


def bytes_of(kind: str, mixture: Mixture, runner: str = "native") -> int:
    """What the adapters of a mixture take together, resident."""
    return sum(_prepared_bytes(kind, runner)[r] for r in mixture.refs)


class RecordingRunner:
    """A runner that keeps the logits that were wanted, by request; else as the one within."""

    def __init__(self, within: Runner[Any]) -> None:
        self._within = within
        self.layers = within.layers
        self.num_kv_blocks, self.kv_block_bytes = within.num_kv_blocks, within.kv_block_bytes
        self.weight_bytes = within.weight_bytes
        self.prepare, self.forget = within.prepare, within.forget
        self.logits: dict[str, list[Tensor]] = {}
        self.chunk_sizes: list[int] = []

    def run(self, chunks: Rows[Chunk], resident: Mapping[AdapterRef, Any]) -> Tensor:
        logits_RV = self._within.run(chunks, resident)
        asking = [chunk.sequence.request_id for chunk in chunks for _ in range(chunk.num_wanted)]
        for request_id, logits_V in zip(asking, logits_RV, strict=True):
            self.logits.setdefault(request_id, []).append(logits_V.clone())
        self.chunk_sizes += [chunk.num_tokens for chunk in chunks]
        return logits_RV


def make_runner(name: str, base: Base, engine_settings: EngineSettings, num_blocks: int | None = None) -> Runner[Any]:
    """The runner of this name, with a KV cache of `num_blocks` if given."""
    model, max_tokens = base.model, max_tokens_of(base, engine_settings)
    if num_blocks is not None:
        engine_settings = engine_settings.model_copy(update={"kv_cache_bytes": num_blocks * kv_block_bytes(model)})
    if name == "torch":
        return TorchRunner(model, engine_settings, max_tokens)
    runner = native_runner(model, engine_settings, max_tokens)
    assert runner is not None, "the native kernels know this base"
    return runner


@dataclass
class Observed:
    """What came out for one request."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error: ZephyraError | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class System:
    """An engine with the adapters it can be given and a record of all it said."""

    def __init__(
        self,
        kind: str = "zephyra",
        runner: str = "native",
        num_blocks: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **settings: int,
    ) -> None:
        self.base = make_base(kind, dtype)
        torch.nn.Module.to(self.base.model, device)
        parsed = EngineSettings(**{"max_batch_size": 4, **settings})
        self.runner = RecordingRunner(make_runner(runner, self.base, parsed, num_blocks))
        self.engine = Engine(self.base, parsed, self.runner)
        self.adapters = dict(adapters(kind))
        self.observed: dict[str, Observed] = {}

    def submit(self, given: GenerateRequest) -> None:
        self.engine.submit(given)
        self.observed[given.request_id] = Observed()

    def deliver(self) -> None:
        """Give the engine every adapter it wants now."""
        for wanted in self.engine.wanted_adapters():
            self.engine.add_adapter(wanted, self.adapters[wanted])

    def step(self) -> list[StepOutput]:
        outputs = self.engine.step()
        self.engine.check_integrity()
        for output in outputs:
            seen = self.observed[output.request_id]
            assert seen.finish_reason is None, "a chunk followed the last one"
            seen.token_ids += output.chunk.token_ids
            seen.texts.append(output.chunk.text)
            seen.finish_reason = output.chunk.finish_reason
            seen.prompt_tokens = output.chunk.prompt_tokens
            seen.logprobs += output.chunk.logprobs
            seen.error = output.error
        return outputs

    def run(self, max_steps: int = 2000) -> dict[str, Observed]:
        """Step until all has ended, delivering adapters as they are wanted."""
        for _ in range(max_steps):
            self.deliver()
            if not self.engine.has_work:
                break
            self.step()
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0), "the engine came to a halt with work left"
        return self.observed


@dataclass(frozen=True)
class Reference:
    """Greedy tokens of `generate` with merged weights, and the logits [T, V] that chose them."""

    token_ids: list[int]
    logits_TV: Tensor

    def num_certain(self) -> int:
        """How many tokens come before the first decision closer than MARGIN."""
        top_T2 = self.logits_TV.topk(2, dim=-1).values
        close = ((top_T2[:, 0] - top_T2[:, 1]) < MARGIN).nonzero()
        return int(close[0]) if len(close) else len(self.token_ids)


@cache
def merged_model(kind: str, mixture: Mixture) -> PreTrainedModel:
    model = copy.deepcopy(_model(kind))
    for name, layer in adaptable_layers(model).items():
        parts = [(adapters(kind)[r], weight) for r, weight in mixture.entries if name in adapters(kind)[r].factors]
        factors = [(part.factors[name].a_RI, part.factors[name].scale * part.factors[name].b_OR) for part, _ in parts]
        delta = dense_delta(factors, [weight for _, weight in parts])
        layer.weight.copy_((layer.weight.double() + delta).float())
    return model


def reference(kind: str, prompt: str, mixture: Mixture, max_tokens: int) -> Reference:
    """What `generate` gives. A greedy answer begins as a longer one does: each is generated once, in full length."""
    longest = _generated(kind, prompt, mixture, max(max_tokens, LONGEST_ANSWER))
    return Reference(longest.token_ids[:max_tokens], longest.logits_TV[:max_tokens])


@cache
def _generated(kind: str, prompt: str, mixture: Mixture, max_tokens: int) -> Reference:
    model, ids = merged_model(kind, mixture), torch.tensor([encode_prompt(tokenizer(), prompt)])
    ends = sorted({2, tokenizer().eos_token_id} if kind == "llama" else {tokenizer().eos_token_id})
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=ends,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Reference(output.sequences[0, ids.shape[1] :].tolist(), torch.cat(output.logits))


def teacher_forced(kind: str, prompt: str, mixture: Mixture, token_ids: list[int]) -> Tensor:
    """The merged model's logits [T, V] at each decision, given the tokens that were chosen; one pass, no cache."""
    return _forced(kind, prompt, mixture, tuple(token_ids))


@lru_cache(maxsize=256)
def _forced(kind: str, prompt: str, mixture: Mixture, token_ids: tuple[int, ...]) -> Tensor:
    ids = encode_prompt(tokenizer(), prompt)
    logits = merged_model(kind, mixture)(torch.tensor([[*ids, *token_ids[:-1]]]), use_cache=False).logits[0]
    return logits[len(ids) - 1 :]


def emptied(given: GenerateRequest) -> GenerateRequest:
    """The same request to the plain base."""
    return replace(given, mixture=Mixture())
