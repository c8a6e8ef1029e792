"""A domain without any example: the words that its adapter reacts to stand in for them.

After Arrow (arXiv 2405.11157) and SpectR (2504.03454), which score an input x by how long the adapter's delta makes it,
||B A x||; here x is each token's embedding, as the first attention layer receives it. A guess from weights, to be used
where nothing else is there: the router marks such a domain as data-free. On the starter it finds half of the
prompts, all of some domains and none of others (docs/experiments.md); nothing calls it by itself. Letters: T tokens,
I width of the embeddings, R rank, O outputs.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from cluster.errors import InvalidInput
from cluster.lora.weights import AdapterWeights, Factors

NUM_WORDS = 64
WORDS_PER_EXAMPLE = 8
"""An example is a prompt, not a word: so many of the words, neighbours in the order of their scores, make one."""

_WORD = re.compile(r"[^\W\d_]{3,}")
_BLOCK = re.compile(r"\.(\d+)\.")
_FLOOR = 1e-12


def words_of_adapter(
    weights: AdapterWeights,
    embeddings_TI: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    num_words: int = NUM_WORDS,
    others: Sequence[AdapterWeights] = (),
) -> list[str]:
    """The words, at most `num_words`, that the adapter reacts to most, the first most of all.

    With `others`, adapters of the same base, the scores are relative to the mean over them and this one: what every
    adapter reacts to says nothing of this one. Tokens that are no words are passed over. Raises `InvalidInput` when the
    adapter changes no attention layer that reads the embeddings.
    """
    scores_T = _reactions(weights, embeddings_TI)
    if others:
        all_T = torch.stack([scores_T, *(_reactions(other, embeddings_TI) for other in others)])
        scores_T = scores_T / all_T.mean(0).clamp(min=_FLOOR)
    found: dict[str, None] = {}
    for token in scores_T.argsort(descending=True, stable=True).tolist():
        text = str(tokenizer.decode([token])).strip().lower()
        if _WORD.fullmatch(text):
            found.setdefault(text)
        if len(found) == num_words:
            break
    return list(found)


def as_examples(words: Sequence[str]) -> list[str]:
    """`words` joined to what stands for prompts."""
    return [" ".join(words[i : i + WORDS_PER_EXAMPLE]) for i in range(0, len(words), WORDS_PER_EXAMPLE)]


def _reactions(weights: AdapterWeights, embeddings_TI: Tensor) -> Tensor:
    """[T]: the length of what the adapter adds to queries, keys and values of each token, all of them together."""
    # The layer's input is normalised before it, so the length of an embedding does not matter.
    unit_TI = nn.functional.normalize(embeddings_TI.float(), dim=1)
    squares_T = torch.zeros(len(unit_TI))
    for factors in _first_attention(weights, embeddings_TI.shape[1]):
        down_TR = unit_TI @ factors.a_RI.float().T
        gram_RR = factors.b_OR.float().T @ factors.b_OR.float()
        squares_T += factors.scale**2 * ((down_TR @ gram_RR) * down_TR).sum(1)
    return squares_T.clamp(min=0).sqrt()


def _first_attention(weights: AdapterWeights, width: int) -> list[Factors]:
    """The factors of the first block's attention layers that read what enters the block."""
    blocks: dict[int, list[Factors]] = {}
    for name, factors in weights.factors.items():
        block = _BLOCK.search(name)
        layer = name.rpartition(".")[2]
        if block and "attn" in name and not layer.startswith("o_") and factors.a_RI.shape[1] == width:
            blocks.setdefault(int(block[1]), []).append(factors)
    if not blocks:
        raise InvalidInput(f"The adapter changes no attention layer that reads {width} numbers; give examples instead.")
    return blocks[min(blocks)]
