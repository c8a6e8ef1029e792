"""A whole root in a second: a nano base with random weights and random adapters, nothing trained."""

from pathlib import Path

import torch

from cluster.config.training import RouterSettings
from cluster.lora import peft_format
from cluster.lora.catalog import Catalog, Change
from cluster.lora.store import write_version
from cluster.lora.weights import AdapterWeights, Factors, adaptable_layers
from cluster.messages import NONE_DOMAIN, AdapterRef
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.base import Base, load_base
from cluster.model.tokenizer import train_tokenizer
from cluster.router.fit import RouterFit
from cluster.router.policy import Policy
from cluster.router.tiny_ada import TinyAda

DOMAINS = ("law", "math", "sql")
CONTEXT_TOKENS = 4096
_TEXTS = ["the quick brown fox jumps over the lazy dog", "What is 7 times 6?", "select name from users where id = 1"]
SENTENCES = {
    "law": ["the court ruled that", "is this contract valid", "the judge dismissed the appeal", "sue my landlord"],
    "math": ["solve the equation", "the integral of x squared", "prove the theorem", "what is 7 times 6"],
    "sql": ["select name from users", "join two tables", "delete rows where id is null", "an index on a column"],
    NONE_DOMAIN: ["good morning", "tell me a joke", "the weather is nice", "my cat sleeps all day"],
}


def build_root(root: Path) -> Path:
    """Write a base and one adapter for each of `DOMAINS` below `root`, publish them, and return `root`."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(_TEXTS, vocab_size=320, max_length_tokens=CONTEXT_TOKENS)
    config = ZephyraFusionConfig(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=CONTEXT_TOKENS
    )
    model = ZephyraFusionForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Far from the small weights a training starts from: adapters then change tokens, not only logits.
                parameter.normal_(std=0.2)
        # Random weights would end most answers at random.
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0.0

    def write_base(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    version = write_version(root / "base", write_base)
    Catalog(root).publish(Change(base=version))
    for seed, domain in enumerate(DOMAINS):
        publish_adapter(root, domain, seed)
    return root


def publish_adapter(root: Path, domain: str, seed: int, base_fingerprint: str | None = None) -> AdapterRef:
    """Publish random factors as the next version of `domain`, by default for the root's own base."""
    base = nano_base(root)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    factors = {
        name: Factors(random(4, layer.in_features), random(layer.out_features, 4), scale=1.0)
        for name, layer in adaptable_layers(base.model).items()
    }
    weights = AdapterWeights(factors, base_fingerprint or base.fingerprint)
    version = write_version(
        root / "adapters" / domain, lambda folder: peft_format.save(folder, weights, base_model_name="nano")
    )
    Catalog(root).publish(Change(adapters={domain: version}))
    return AdapterRef(domain, version)


def publish_router(root: Path, sentence_encoder: str | None = None) -> TinyAda:
    """Train a router on a handful of sentences for a second, publish it, and return it.

    It never says none: what it decides would otherwise depend on how well a second teaches that.
    """
    texts = [text for lines in SENTENCES.values() for text in lines]
    domains = [domain for domain, lines in SENTENCES.items() for _ in lines]
    settings = RouterSettings(steps=40, batch_size=16, sentence_encoder=sentence_encoder)
    fit = RouterFit(texts, domains, texts, domains, settings, nano_base(root).num_parameters)
    for _ in range(fit.num_steps):
        fit.step()
    ada = fit.finish()
    ada.policy = Policy(threshold=-1e3)
    Catalog(root).publish(Change(router=write_version(root / "router", ada.save)))
    return ada


def base_path(root: Path) -> Path:
    return root / "base" / str(Catalog(root).load().base)


def nano_base(root: Path) -> Base:
    """The root's base, loaded anew."""
    return load_base(base_path(root))
