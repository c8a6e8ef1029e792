"""A BERT of a few thousand random weights, in Hugging Face's format: a sentence encoder that knows nothing."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from cluster.router.sentence_model import SentenceModel
from tests.router.prompts import prompts

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WIDTH = 24


def write_small_bert(folder: Path) -> Path:
    """Write it into `folder`, which exists; gives it back."""
    words = sorted({word.strip("?.,").lower() for text in prompts("train", 60)[0] for word in text.split()})
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = dict.fromkeys((*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(piece, vocabulary[piece]) for piece in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    # As all-MiniLM-L6-v2 comes: with a length that its file asks for, and padding to it.
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=32,
            max_position_embeddings=128,
            initializer_range=0.5,
        )
        model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def small_bert(folder: Path) -> SentenceModel:
    """The same, loaded."""
    return SentenceModel.load(write_small_bert(folder))
