"""What each training step hides, so that unseen words, unseen domains and prompts of no domain are no surprise.

Knows nothing of vectors or losses. Letters: B texts, N features, D domains.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config.training import RouterSettings
from cluster.router.features import PAIR, WORD, FeatureBatch
from cluster.router.lexicon import NUM_GROUPS, Counted

_MIN_DOMAINS = 3
"""With fewer domains none is hidden: what remained would be no choice."""

_KEYWORD_SHARE = 0.25
"""A word with more than this share of what a prompt's words say of its domain is a keyword."""


_LONG = 40
"""Prompts of so many words, or more, are left out of at the full rate."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One step's view of its batch."""

    hidden_N: Tensor
    """Features to take for never seen."""
    silent_N: Tensor
    """Features to leave out without taking them for never seen."""
    hidden_D: Tensor
    """Domains that do not exist in this step."""
    own_B: Tensor
    """The texts' domains; D for none."""
    labels_B: Tensor
    """The right answers in this step; D for none."""


def draw_episode(
    batch: FeatureBatch,
    labels_B: Tensor,
    counted: Counted,
    num_domains: int,
    settings: RouterSettings,
    rng: torch.Generator,
) -> Episode:
    """Hide features of a single text, words, pairs, and at times whole domains with all features that only they have.
    Leave out features, and words with all of theirs.

    Prompts of hidden domains, and prompts that lost their keywords (a share of `outlier_rate` of all), teach none.
    """
    hidden_N = ~counted.repeated[batch.slots_N]
    hidden_D = torch.zeros(num_domains, dtype=torch.bool)
    if num_domains >= _MIN_DOMAINS and float(torch.rand((), generator=rng)) < settings.hidden_domain_rate:
        groups = _draw_groups(num_domains, rng)
        hidden_D = torch.isin(torch.arange(num_domains) % NUM_GROUPS, groups)
        bits = int((1 << groups).sum())
        hidden_N |= (counted.groups[batch.slots_N] & ~bits) == 0
    rate_B = 2 * settings.word_dropout * torch.rand(batch.num_texts, generator=rng)
    outlier_B = torch.rand(batch.num_texts, generator=rng) < settings.outlier_rate
    heavy_B = settings.outlier_dropout + (1 - settings.outlier_dropout) * torch.rand(batch.num_texts, generator=rng)
    rate_B = torch.where(outlier_B, heavy_B, rate_B)
    text_W, keyword_W = _keywords(batch, counted)
    chance_W = torch.rand(batch.num_words, generator=rng)
    # A prompt keeps its keywords, and one that teaches none loses them, whatever else it keeps.
    lost_W = torch.where(keyword_W, outlier_B[text_W], chance_W < rate_B[text_W])
    hidden_N |= lost_W[batch.words_N]
    pair_rate_B = 2 * settings.pair_dropout * torch.rand(batch.num_texts, generator=rng)
    lost_N = torch.rand(len(batch.slots_N), generator=rng) < pair_rate_B[batch.texts_N]
    hidden_N |= lost_N & (batch.kinds_N == PAIR)
    silent_N = torch.zeros_like(hidden_N)
    if settings.feature_dropout:
        silent_N = torch.rand(len(batch.slots_N), generator=rng) < settings.feature_dropout
    if settings.word_omission:
        omission_B = 2 * settings.word_omission * torch.rand(batch.num_texts, generator=rng)
        # Of few words each is needed.
        omission_B *= (text_W.bincount(minlength=batch.num_texts) / _LONG).clamp(max=1)
        omitted_W = ~keyword_W & (torch.rand(batch.num_words, generator=rng) < omission_B[text_W])
        silent_N |= omitted_W[batch.words_N]
    none_B = outlier_B | torch.cat((hidden_D, torch.ones(1, dtype=torch.bool)))[labels_B]
    return Episode(hidden_N, silent_N, hidden_D, labels_B, torch.where(none_B, num_domains, labels_B))


def _keywords(batch: FeatureBatch, counted: Counted) -> tuple[Tensor, Tensor]:
    """Of each word of the batch, its text, and whether it says much of all that the text's words say of the domain."""
    text_W = torch.zeros(batch.num_words, dtype=torch.long).index_put_((batch.words_N,), batch.texts_N)
    is_word_N = batch.kinds_N == WORD
    worth_W = torch.zeros(batch.num_words)
    worth_W[batch.words_N[is_word_N]] = counted.worth[batch.slots_N[is_word_N]]
    all_B = torch.zeros(batch.num_texts).index_add_(0, text_W, worth_W)
    return text_W, worth_W > _KEYWORD_SHARE * all_B[text_W]


def _draw_groups(num_domains: int, rng: torch.Generator) -> Tensor:
    """From one group of domains to a third of them, all different."""
    num_groups = min(num_domains, NUM_GROUPS)
    num_hidden = int(torch.randint(1, num_groups // 3 + 1, (), generator=rng))
    return torch.randperm(num_groups, generator=rng)[:num_hidden]
