"""Training of tiny ada, one optimizer step at a time, resumable at any of them.

Prototypes are learned beside the encoder, against prompts whose words and domains are hidden at random. Knows nothing
of files or progress bars. Letters: B texts, D domains, P prototypes, W width.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.config.training import RouterSettings
from cluster.errors import InvalidData, InvalidInput
from cluster.messages import NONE_DOMAIN, check_domain_name
from cluster.router.encoder import NOVEL_WIDTH, Encoder, Encoding, join
from cluster.router.episodes import Episode, draw_episode
from cluster.router.features import NUM_SLOTS, TextFeatures, collate
from cluster.router.head import Head, domain_logits
from cluster.router.lexicon import count
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.policy import Policy
from cluster.router.run_state import fits, restore, state_of
from cluster.router.sentence_encoder import SentenceEncoder, read
from cluster.router.sentence_model import SentenceModel, find_sentence_model
from cluster.router.teaching import Teaching
from cluster.router.tiny_ada import TinyAda
from cluster.router.topics import Topics
from cluster.router.tuning import Tuning, kinds_of
from cluster.router.word_vectors import WORD_WIDTH, WordVectors

PARAMETER_FLOOR = 262_144
"""Parameters of the router for a base so small that its share would not suffice."""

SHARE_OF_BASE = 0.04
"""Parameters of the router beside the base's, above the floor: a base of 10M and more gets 1 to 5 %."""

MOST_SHARE_OF_BASE = 0.05
"""With a pretrained sentence encoder, which is nearly all of that for a base of half a billion."""

_SHARE_OF_WORDS = 0.3
"""Of the router's parameters, those that may be the numbers of words taken from a teacher."""

_ENCODE_BATCH = 256
_CHECKPOINT = "router_fit.safetensors"
_TUNING = "tuning."

_VOTES_WEIGHT, _SENTENCE_WEIGHT = 0.5, 0.5
"""Of the losses of naive Bayes alone and of the sentence alone. The rows of n-grams learn the training texts by heart,
and then nothing is left from which what stands beside them could learn."""


@dataclass(frozen=True, slots=True)
class _Labelled:
    texts: Sequence[str]
    features: list[TextFeatures]
    labels_B: Tensor


class RouterFit:
    """A training run. `step` it `num_steps` times, then `finish`."""

    def __init__(
        self,
        texts: Sequence[str],
        domains: Sequence[str],
        val_texts: Sequence[str],
        val_domains: Sequence[str],
        settings: RouterSettings,
        num_base_parameters: int,
        topics: Sequence[str] | None = None,
        sentences: SentenceModel | None = None,
    ) -> None:
        """`domains` names the domain of each text; "none" marks texts of no domain, which may be absent.

        `topics`, if known, names the kind of each text within its domain, such as one intent of many: each kind then
        has a prototype of its own, and is told from all others. `sentences`, if loaded already, is the model that the
        settings name. Validation texts calibrate and teach nothing. Raises `InvalidData` for lengths that differ, no
        domain at all, or a domain that is validated but not trained; `InvalidInput` for an impossible name, two models
        or one that is not there, `CorruptArtifact` for one that cannot be read.
        """
        self.domains = tuple(sorted({check_domain_name(name) for name in domains if name != NONE_DOMAIN}))
        if not self.domains:
            raise InvalidData("The router has no domain to learn; give texts of at least one.")
        self.settings = settings
        self._sentences, self._teacher = _models(settings, sentences)
        self._train = self._labelled("training", texts, domains, self._teacher)
        self._topics = Topics(self._train.labels_B, topics, len(self.domains), settings.prototypes_per_domain)
        self._val = self._labelled("validation", val_texts, val_domains, None)
        if not bool((self._val.labels_B < len(self.domains)).any()):
            raise InvalidData("There is no validation text of any domain; the router needs some to calibrate.")
        self._tuning = None
        if self._sentences is not None:
            kinds_N = kinds_of(self._train.labels_B, topics, len(self.domains))
            self._tuning = Tuning(self._sentences, texts, kinds_N, settings.seed)
            self._sentences = self._tuning.model
        self._num_tuning = 0 if self._tuning is None else self._tuning.num_steps
        self.num_steps = self._num_tuning + settings.steps
        self._build(texts, self._num_trained(num_base_parameters))
        self._num_done = 0
        self._rng = torch.Generator().manual_seed(settings.seed)

    def _labelled(
        self, what: str, texts: Sequence[str], domains: Sequence[str], sentences: SentenceModel | None
    ) -> _Labelled:
        if len(texts) != len(domains):
            raise InvalidData(f"There are {len(texts)} {what} texts and {len(domains)} domains; each text needs one.")
        numbers = {name: number for number, name in enumerate((*self.domains, NONE_DOMAIN))}
        strange = sorted(set(domains) - set(numbers))
        if strange:
            raise InvalidData(f"The {what} texts name {strange[0]!r}, which no training text does; add some to both.")
        return _Labelled(texts, read(texts, sentences), torch.tensor([numbers[name] for name in domains]))

    def _num_trained(self, num_base_parameters: int) -> int:
        """How many parameters may be trained, beside the pretrained ones."""
        if self._sentences is None:
            return max(PARAMETER_FLOOR, int(SHARE_OF_BASE * num_base_parameters))
        left = int(MOST_SHARE_OF_BASE * num_base_parameters) - self._sentences.num_parameters
        return max(PARAMETER_FLOOR, left)

    def _build(self, texts: Sequence[str], num_parameters: int) -> None:
        """Make everything trained, of at most `num_parameters`, from the seed."""
        width, num_domains = self.settings.width, len(self.domains)
        labels = self._train.labels_B.numpy()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.head = Head(num_domains, self._topics.most_rows, width)
            layers = sum(p.numel() for p in self.head.parameters()) + 4 * width * width + 3 * width
            layers += 0 if self._sentences is None else self._sentences.width * width
            words, self._teaching = None, None
            if self._teacher is not None:
                most_words = int(_SHARE_OF_WORDS * num_parameters) // WORD_WIDTH
                words = WordVectors.taken_from(self._teacher, texts, most_words, width)
                layers += words.num_parameters
                self._teaching = Teaching(self._train.features, width)
            votes = None
            if self.settings.naive_bayes and not self._topics.are_known:
                votes = NaiveBayes.counted(self._train.features, labels, num_domains, width)
                layers += sum(p.numel() for p in votes.parameters())
            num_rows = min((num_parameters - layers) // width, NUM_SLOTS)
            self._counted = count(self._train.features, labels, num_domains + 1, num_rows)
            ngrams = Encoder(self._counted.lexicon, num_rows, width, words, votes)
            self.encoder: Encoder | SentenceEncoder = ngrams
            if self._sentences is not None:
                self.encoder = SentenceEncoder(ngrams, self._sentences)
            proxies_DPW = torch.randn(num_domains, self._topics.most_rows, width)
        self.proxies_DPW = nn.Parameter(nn.functional.normalize(proxies_DPW, dim=-1))
        self._trained = [*self.encoder.parameters(), *self.head.parameters(), self.proxies_DPW]
        if self._teaching is not None:
            self._trained += self._teaching.parameters()
        self._optimizer = torch.optim.Adam(self._trained, lr=self.settings.learning_rate, fused=True)
        # Between drawing by rows, where a small domain drowns, and by domains, where it is learned by heart.
        sizes = np.bincount(labels, minlength=num_domains + 1)
        self._draw_weights_B = torch.from_numpy(1 / np.sqrt(sizes[labels]))

    @property
    def batch_size(self) -> int:
        """Prompts of one step."""
        return self.settings.batch_size

    def step(self) -> float:
        """One optimizer step, of the sentence encoder first, then of all else; returns its loss, in nats."""
        loss = self._tune() if self._tuning is not None and self._num_done < self._num_tuning else self._learn()
        self._num_done += 1
        return loss

    def _tune(self) -> float:
        assert self._tuning is not None
        loss = self._tuning.step()
        if self._num_done + 1 == self._num_tuning:
            self._read_sentences()
        return loss

    def _read_sentences(self) -> None:
        """Each text once, now that what reads them stays as it is."""
        for part in (self._train, self._val):
            part.features[:] = read(part.texts, self._sentences)
        if isinstance(self.encoder, SentenceEncoder):
            vectors = [text.sentence_S for text in self._train.features if text.sentence_S is not None]
            self.encoder.orient(torch.from_numpy(np.stack(vectors)))

    def _learn(self) -> float:
        """The learning rate falls along half a cosine."""
        settings, num_domains = self.settings, len(self.domains)
        progress = min((self._num_done - self._num_tuning) / settings.steps, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
        drawn_B = torch.multinomial(self._draw_weights_B, settings.batch_size, replacement=True, generator=self._rng)
        batch = collate([self._train.features[index] for index in drawn_B.tolist()])
        episode = draw_episode(batch, self._train.labels_B[drawn_B], self._counted, num_domains, settings, self._rng)
        encoding = self.encoder(batch, episode)
        loss = self._loss(encoding, episode, drawn_B)
        if encoding.votes_BW is not None:
            loss = loss + _VOTES_WEIGHT * self._loss(replace(encoding, z_BW=encoding.votes_BW), episode, drawn_B)
        if isinstance(self.encoder, SentenceEncoder):
            loss = loss + _SENTENCE_WEIGHT * self._loss(self.encoder.without_ngrams(batch, encoding), episode, drawn_B)
        if self._teaching is not None:
            loss = loss + self._teaching.loss(encoding.z_BW, batch, episode.labels_B < num_domains)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.item()

    def _loss(self, encoding: Encoding, episode: Episode, drawn_B: Tensor) -> Tensor:
        """Cross entropy over domains and none and, where topics are known, over all of these and none; in nats."""
        prototypes_DPW = nn.functional.normalize(self.proxies_DPW, dim=-1)
        logits_BD = domain_logits(encoding.z_BW, prototypes_DPW, self._topics.num_rows_D)
        none_B1 = self.head.none_logit(encoding)[:, None]
        logits_BC = torch.cat((logits_BD.masked_fill(episode.hidden_D, -math.inf), none_B1), dim=1)
        loss = nn.functional.cross_entropy(logits_BC, episode.labels_B)
        if self._topics.are_known:
            loss = loss + self._topics.loss(encoding.z_BW, prototypes_DPW, none_B1, episode, drawn_B)
        return loss

    @torch.no_grad()
    def finish(self) -> TinyAda:
        """The router as trained so far, calibrated on the validation texts. Training may go on afterwards."""
        if self._num_done < self._num_tuning:
            self._read_sentences()
        encoder, head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        for index, rows_PW in enumerate(nn.functional.normalize(self.proxies_DPW, dim=-1)):
            num_rows = int(self._topics.num_rows_D[index])
            head.set_rows(index, nn.functional.pad(rows_PW[:num_rows], (0, NOVEL_WIDTH)))
        ada = TinyAda(self.domains, encoder, head, Policy(0.0)).eval()
        held_out = self._encode(self._val.features)
        ada.calibrate(held_out, self._val.labels_B, self.settings.target_false_rejection)
        if self.settings.sketch_share and self._topics.are_known:
            self._add_sketches(ada)
            ada.level_none(held_out, self._val.labels_B)
            ada.calibrate(held_out, self._val.labels_B, self.settings.target_false_rejection)
        return ada

    def _add_sketches(self, ada: TinyAda) -> None:
        """Beside the vector of each prototype, the mean sketch of the texts of its domain that are nearest to it."""
        encoding = self._encode(self._train.features)
        for index in range(len(self.domains)):
            own_N = self._train.labels_B == index
            rows_PW = ada.head.prototypes_DPV[index, : self._topics.num_rows_D[index], : self.settings.width]
            owner_N = (encoding.z_BW[own_N] @ rows_PW.T).argmax(1)
            sums_PU = torch.zeros(len(rows_PW), NOVEL_WIDTH).index_add_(0, owner_N, encoding.novel_BU[own_N])
            sketches_PU = self.settings.sketch_share * nn.functional.normalize(sums_PU, dim=1)
            ada.head.set_rows(index, torch.cat((rows_PW, sketches_PU), dim=1))

    def _encode(self, features: list[TextFeatures]) -> Encoding:
        starts = range(0, len(features), _ENCODE_BATCH)
        return join([self.encoder(collate(features[start : start + _ENCODE_BATCH])) for start in starts])

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes from step to step, the optimizer and the random state included, as plain tensors."""
        state = state_of(self._trained, self._optimizer)
        if self._tuning is not None:
            state |= {f"{_TUNING}{name}": value for name, value in self._tuning.state_dict().items()}
        state["random"] = self._rng.get_state()
        state["num_done"] = torch.tensor(self._num_done)
        state["row_slots"] = self._counted.lexicon.row_slots.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken: further steps give the same bits as if never interrupted.

        Raises `InvalidData` when the state comes from other texts, domains or settings.
        """
        tuning = {name.removeprefix(_TUNING): value for name, value in state.items() if name.startswith(_TUNING)}
        is_whole = fits(self._trained, state) and (self._tuning is None or self._tuning.fits(tuning))
        if not is_whole or not torch.equal(state["row_slots"], self._counted.lexicon.row_slots):
            raise InvalidData("The router's checkpoint comes from other texts or settings; delete it and start again.")
        restore(self._trained, self._optimizer, state)
        if self._tuning is not None:
            self._tuning.load_state_dict(tuning)
        self._rng.set_state(state["random"])
        self._num_done = int(state["num_done"])
        if self._tuning is not None and self._num_done >= self._num_tuning:
            self._read_sentences()

    def save(self, folder: Path) -> None:
        """Write `state_dict` into `folder`, which exists."""
        safetensors.torch.save_file(self.state_dict(), folder / _CHECKPOINT)

    def load(self, folder: Path) -> int:
        """Go on where `save` was called; returns how many steps were done then. Raises like `load_state_dict`."""
        self.load_state_dict(safetensors.torch.load_file(folder / _CHECKPOINT))
        return self._num_done


def _models(
    settings: RouterSettings, loaded: SentenceModel | None
) -> tuple[SentenceModel | None, SentenceModel | None]:
    """What stands beside the n-grams, and what teaches them; the one that the settings name may be loaded already."""
    names = [name for name in (settings.sentence_encoder, settings.teacher) if name is not None]
    if len(names) > 1:
        raise InvalidInput(
            f"The settings name the sentence encoder {names[0]!r} and the teacher {names[1]!r}; name one of them: what "
            "reads each prompt has nothing to teach."
        )
    model = loaded or (SentenceModel.load(find_sentence_model(names[0])) if names else None)
    return (None, model) if settings.teacher is not None else (model, None)
