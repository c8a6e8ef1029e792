"""Bases of others, as they come: a folder in Hugging Face's format with a tokenizer that is not ours."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.model.shapes import VOCABULARY, small_model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
QUESTION = "What is the capital of France?"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def _bytes_and_merges() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, "the quick brown fox jumps over the lazy dog"] * 3, trainer)
    return tokenizer


def foreign_tokenizer(template: str | None = None) -> PreTrainedTokenizerBase:
    """As Qwen's: byte-level, nothing put in front of a text, no token that begins one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_and_merges(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    assert len(tokenizer) <= VOCABULARY
    tokenizer.chat_template = template
    return tokenizer


def write_foreign(folder: Path, model: PreTrainedModel | str = "qwen2", template: str | None = None) -> Path:
    """Write a model, or a small random one of that architecture, and a tokenizer into `folder`."""
    made = small_model(model, tied=model == "qwen2") if isinstance(model, str) else model
    made.save_pretrained(folder)
    foreign_tokenizer(template).save_pretrained(folder)
    return folder
