"""The tokenizer of Zephyra Fusion: byte-level BPE, trained on the data at hand.

A prompt is a user's turn. So plain tokenization of a prompt and the chat template of a single user message give the
same ids, and `/v1/completions`, `/v1/chat/completions`, `generate` and training all mean the same by it:

    <|bos|> <|user|> prompt <|assistant|> response <|eos|>
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"
_SPECIAL = [PAD, BOS, EOS, USER, ASSISTANT, SYSTEM]

_CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length_tokens: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE over `texts`: any text can be encoded and comes back as it was. Digits stay single.

    The same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} {USER} $A {ASSISTANT}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, USER, ASSISTANT)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        model_max_length=max_length_tokens,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
