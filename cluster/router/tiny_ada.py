"""Tiny ada, the router: from prompts to probabilities over domains and none, and to the weights to mix them with.

Knows nothing of adapters, versions or training by gradient. Letters: B texts, D domains, V width of a prototype.
"""

import bisect
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

from cluster.errors import CorruptArtifact, InvalidData, InvalidInput, UnknownDomain
from cluster.messages import NONE_DOMAIN, RoutingDecision, check_domain_name
from cluster.router.calibration import fit_temperature, fit_threshold
from cluster.router.conversation import Turn, settle
from cluster.router.encoder import NOVEL_WIDTH, Encoder, Encoding, join
from cluster.router.features import collate
from cluster.router.few_shot import (
    LENGTH_BESIDE_SENTENCE,
    VECTOR_LENGTH,
    RowShape,
    few_shot_logits,
    few_shot_offset,
    few_shot_prototypes,
)
from cluster.router.head import Head, keys
from cluster.router.lexicon import Lexicon
from cluster.router.naive_bayes import NaiveBayes
from cluster.router.one_call import OneCall
from cluster.router.policy import Policy, probabilities
from cluster.router.prototypes import recentre
from cluster.router.sentence_encoder import SentenceEncoder
from cluster.router.sentence_model import SentenceModel, checksum
from cluster.router.word_vectors import WordVectors

_CONFIG, _TENSORS, _SENTENCES = "router.json", "router.safetensors", "sentence_encoder"
_ENCODE_BATCH = 256


class TinyAda(nn.Module):
    """The router. Immutable in serving: adding or removing a domain gives a new one, which shares the encoder: copy one
    of them (`copy.deepcopy`) before training it.
    """

    def __init__(
        self, domains: tuple[str, ...], encoder: Encoder | SentenceEncoder, head: Head, policy: Policy
    ) -> None:
        """`domains`, sorted, name the rows of `head`."""
        super().__init__()
        assert list(domains) == sorted(set(domains)), "domains must be sorted and all different"
        self.domains = domains
        self.encoder = encoder
        self.head = head
        self.policy = policy
        self.data_free: frozenset[str] = frozenset()
        """Domains known by words of their adapters alone: a guess, until somebody gives examples."""
        self._one_call: OneCall | None = None
        self._sealed: OneCall | None = None

    @property
    def num_parameters(self) -> int:
        """Everything trained by gradient, here or by others: the encoder's table and layers, the none network, what a
        teacher said of words, and a pretrained sentence encoder.

        Prototypes are not counted (they are rows of data, made from examples), nor the lexicon's indices, nor how many
        texts hold a feature.
        """
        num_pretrained = 0
        if isinstance(self.encoder, SentenceEncoder):
            num_pretrained = self.encoder.sentences.num_parameters
        elif self.encoder.words is not None:
            num_pretrained = self.encoder.words.vectors_YQ.numel()
        return sum(parameter.numel() for parameter in self.parameters()) + num_pretrained

    def encode(self, texts: Sequence[str]) -> Encoding:
        """What the head reads of `texts`; differentiable."""
        encoding: Encoding = self.encoder(collate(self.encoder.read(texts)))
        return encoding

    def logits(self, texts: Sequence[str]) -> Tensor:
        """[B, D + 1], none last, calibrated: their softmax is the probabilities. Differentiable."""
        if texts and not torch.is_grad_enabled() and (at_once := self._at_once()) is not None:
            return torch.from_numpy(at_once.logits(texts))
        logits_BC: Tensor = self.head(self.encode(texts))
        return logits_BC

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities [B, D + 1], none last; differentiable, so that joint fine-tuning trains through them."""
        return self.logits(texts).log_softmax(1)

    def route(self, texts: Sequence[str]) -> list[RoutingDecision]:
        """Decide for each text; any string is accepted. `compute_ms` is what the text's share of the call took."""
        decisions: list[RoutingDecision] = []
        for start in range(0, len(texts), _ENCODE_BATCH):
            start_s = time.perf_counter()
            rows = self._rows(texts[start : start + _ENCODE_BATCH])
            decided = [(probabilities(self.domains, row), self.policy.weights(self.domains, row)) for row in rows]
            compute_ms = (time.perf_counter() - start_s) * 1000 / len(rows)
            decisions += [RoutingDecision(probable, weights, compute_ms) for probable, weights in decided]
        return decisions

    def route_conversation(self, turns: Sequence[str]) -> RoutingDecision:
        """Decide for the last of a user's turns, oldest first, in the light of those before it; alone as `route` does.

        Raises `InvalidInput` when there is no turn.
        """
        if not turns:
            raise InvalidInput("The conversation has no turn to route; give at least one.")
        start_s = time.perf_counter()
        rows = self._rows(turns)
        scored = [Turn(row, len(text)) for row, text in zip(rows, turns, strict=True)]
        settled = settle(scored, self.policy)
        weights = self.policy.weights(self.domains, settled)
        return RoutingDecision(probabilities(self.domains, settled), weights, (time.perf_counter() - start_s) * 1000)

    def _rows(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """`logits` of at least one text, without torch where there is a native call."""
        if (at_once := self._sealed or self._at_once()) is not None:
            return at_once.logits(texts).astype(np.float64)
        with torch.inference_mode():
            rows: NDArray[np.float64] = self.logits(texts).numpy().astype(np.float64)
        return rows

    @torch.no_grad()
    def with_domain(
        self,
        name: str,
        examples: Sequence[str],
        topics: Sequence[str] | None = None,
        is_data_free: bool = False,
    ) -> "TinyAda":
        """A router that also knows `name`, from a few prompts of it: rows are added, nothing is trained.

        Every other logit stays as it is, bit for bit. `topics`, if known, names the kind of each example within the
        domain, such as one intent of many: each has a row of its own then, where else examples that lie together
        share one. `is_data_free` marks examples that nobody gave (`cluster/router/data_free.py`). Raises `InvalidInput`
        for a name that is taken or cannot be one, no examples, or not one topic for each.
        """
        check_domain_name(name)
        if name in self.domains:
            raise InvalidInput(
                f"The router knows the domain {name!r} already; remove it first, or choose another name."
            )
        if not examples:
            raise InvalidInput(f"There are no examples of the domain {name!r}; give at least one prompt.")
        if topics is not None and len(topics) != len(examples):
            raise InvalidInput(f"There are {len(examples)} examples and {len(topics)} topics; give a topic for each.")
        encoding = self._encode_all(examples)
        has_sentences = isinstance(self.encoder, SentenceEncoder)
        vector_length = LENGTH_BESIDE_SENTENCE if has_sentences else VECTOR_LENGTH
        given = (keys(encoding), RowShape(self.encoder.width, self._num_rows, vector_length), topics)
        rows_PV = few_shot_prototypes(*given)
        grown = self._fork()
        index = bisect.bisect(self.domains, name)
        grown.domains = (*self.domains[:index], name, *self.domains[index:])
        grown.head.insert(index)
        grown.head.make_room(len(rows_PV))
        grown.head.set_rows(index, rows_PV)
        if not has_sentences:
            threshold = self.policy.threshold * self.head.temperature
            none_N = self.head.none_logit(encoding) + self.head.none_offset + threshold
            grown.head.offsets_D[index] = few_shot_offset(few_shot_logits(*given), none_N, self.head.own_logit)
        if is_data_free:
            grown.data_free |= {name}
        return grown

    def without_domain(self, name: str) -> "TinyAda":
        """A router that no longer knows `name`; every other logit stays as it is. Raises `UnknownDomain`."""
        index = self._index(name)
        shrunk = self._fork()
        shrunk.domains = (*self.domains[:index], *self.domains[index + 1 :])
        shrunk.head.remove(index)
        shrunk.data_free -= {name}
        return shrunk

    @torch.no_grad()
    def refit(
        self,
        texts: Sequence[str],
        domains: Sequence[str],
        held_out_texts: Sequence[str],
        held_out_domains: Sequence[str],
        target_false_rejection: float = 0.01,
    ) -> None:
        """Rebuild prototypes, temperature and threshold, in place, after the encoder moved.

        `texts` move the prototypes: each comes with its domain, or none, and every domain needs one. The held-out
        texts calibrate; none's logit is shifted as far as their logits for their own domains were, so that domains
        and none stand to each other as before. Raises `InvalidData` or `UnknownDomain`.
        """
        if missing := set(self.domains) - set(domains):
            lacking = ", ".join(sorted(missing))
            raise InvalidData(f"The texts to refit on lack {lacking}; give some of every domain, each with its domain.")
        labels_B, held_labels_B = self._labels(texts, domains), self._labels(held_out_texts, held_out_domains)
        keys_BV = keys(self._encode_all(texts))
        for index in range(len(self.domains)):
            self._recentre(index, keys_BV[labels_B == index])
        held_out = self._encode_all(held_out_texts)
        self.level_none(held_out, held_labels_B)
        self.calibrate(held_out, held_labels_B, target_false_rejection)

    @torch.no_grad()
    def recalibrate(
        self, held_out_texts: Sequence[str], held_out_domains: Sequence[str], target_false_rejection: float = 0.01
    ) -> None:
        """Fit temperature and threshold anew, in place, and leave the prototypes where they are."""
        labels_B = self._labels(held_out_texts, held_out_domains)
        self.calibrate(self._encode_all(held_out_texts), labels_B, target_false_rejection)

    @torch.no_grad()
    def level_none(self, encoding: Encoding, labels_B: Tensor) -> None:
        """Shift none's logit, in place, as far as held-out prompts' own logits moved since `calibrate`."""
        self.head.none_offset += _own_logit(self.head.raw_logits(encoding), labels_B) - self.head.own_logit

    @torch.no_grad()
    def calibrate(self, encoding: Encoding, labels_B: Tensor, target_false_rejection: float) -> None:
        """Fit temperature and threshold to held-out prompts; `labels_B` numbers their domains, D for none."""
        raw_BC = self.head.raw_logits(encoding)
        self.head.own_logit.copy_(_own_logit(raw_BC, labels_B))
        self.head.temperature.fill_(fit_temperature(raw_BC, labels_B))
        self.policy = Policy(fit_threshold(raw_BC / self.head.temperature, labels_B, target_false_rejection))

    def save(self, folder: Path) -> None:
        """Write the router into `folder`, which exists, as one JSON and one safetensors file, and a pretrained sentence
        encoder, whole, as a folder beside them.
        """
        sentence_checksum, ngrams = None, self.encoder
        if isinstance(ngrams, SentenceEncoder):
            (folder / _SENTENCES).mkdir()
            ngrams.sentences.save(folder / _SENTENCES)
            sentence_checksum, ngrams = checksum(folder / _SENTENCES), ngrams.ngrams
        saved = _Saved(
            domains=self.domains,
            num_table_rows=ngrams.table.num_embeddings,
            width=ngrams.width,
            sentence_checksum=sentence_checksum,
            threshold=self.policy.threshold,
            data_free=tuple(sorted(self.data_free)),
        )
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / _TENSORS)
        (folder / _CONFIG).write_text(saved.model_dump_json(indent=2))

    @classmethod
    def load(cls, folder: Path) -> "TinyAda":
        """The router that `save` wrote. Raises `CorruptArtifact` when it cannot be read or is not what it says."""
        try:
            saved = _Saved.model_validate_json((folder / _CONFIG).read_text())
            tensors = safetensors.torch.load_file(folder / _TENSORS)
            at = "encoder" if saved.sentence_checksum is None else "encoder.ngrams"
            lexicon = Lexicon(*(tensors[f"{at}.lexicon.{name}"] for name in ("row_slots", "known_bits", "rarities")))
            num_domains, num_rows, _ = tensors["head.prototypes_DPV"].shape
            if num_domains != len(saved.domains):
                raise CorruptArtifact(f"The router names {len(saved.domains)} domains and has rows for {num_domains}.")
            words = None
            if f"{at}.words.slots_Y" in tensors:
                words = WordVectors(tensors[f"{at}.words.slots_Y"], tensors[f"{at}.words.vectors_YQ"], saved.width)
            votes = None
            if f"{at}.votes.slots_F" in tensors:
                names = ("slots_F", "num_texts_F", "starts", "domains_M", "counts_M", "domains_DW")
                votes = NaiveBayes(*(tensors[f"{at}.votes.{name}"] for name in names))
            ngrams = Encoder(lexicon, saved.num_table_rows, saved.width, words, votes)
            encoder: Encoder | SentenceEncoder = ngrams
            if saved.sentence_checksum is not None:
                encoder = SentenceEncoder(ngrams, _load_sentences(folder / _SENTENCES, saved.sentence_checksum))
            ada = cls(saved.domains, encoder, Head(num_domains, num_rows, saved.width), Policy(saved.threshold))
            ada.load_state_dict(tensors)
            ada.data_free = frozenset(saved.data_free)
            ada.head.check_rows()
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
            raise CorruptArtifact(f"The router in {folder.name} cannot be read ({error}); train it again.") from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise CorruptArtifact(f"The router in {folder.name} holds NaN or infinity; train it again.")
        ada.head.fixed_prototypes()  # now, not with the first prompt
        return ada

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles: their numbers lie elsewhere."""
        return {**self.__dict__, "_one_call": None, "_sealed": None}

    def seal(self) -> None:
        """From now on it is to stay as it is, and looks no more whether its numbers lie elsewhere."""
        self._sealed = self._at_once()

    def _at_once(self) -> OneCall | None:
        """The whole of it as one native call, made anew when its numbers lie elsewhere; None where there is none."""
        if not isinstance(self.encoder, Encoder):
            return None
        if self._one_call is None or not self._one_call.is_of(self.encoder, self.head):
            self._one_call = OneCall.of(self.encoder, self.head)
        return self._one_call

    def _fork(self) -> "TinyAda":
        """A copy to add rows to or take them from. What is only replaced, not written to, when that is done, is shared:
        the encoder is by far the most, and of ten thousand domains the rows.
        """
        shared = (self.encoder, self.domains, self.head.prototypes_DPV)
        return copy.deepcopy(self, {id(part): part for part in shared})

    @property
    def _num_rows(self) -> int:
        return self.head.prototypes_DPV.shape[1]

    def _index(self, name: str) -> int:
        if name not in self.domains:
            raise UnknownDomain(f"The router knows no domain {name!r}; it knows {', '.join(self.domains) or 'none'}.")
        return self.domains.index(name)

    def _labels(self, texts: Sequence[str], domains: Sequence[str]) -> Tensor:
        """int64 [B]: the number of each text's domain, D for none."""
        if len(texts) != len(domains):
            raise InvalidData(f"There are {len(texts)} texts and {len(domains)} domains; give a domain for each text.")
        numbers = {name: number for number, name in enumerate((*self.domains, NONE_DOMAIN))}
        return torch.tensor([numbers[name] if name in numbers else self._index(name) for name in domains])

    def _encode_all(self, texts: Sequence[str]) -> Encoding:
        return join([self.encode(texts[i : i + _ENCODE_BATCH]) for i in range(0, len(texts), _ENCODE_BATCH)])

    def _recentre(self, index: int, keys_NV: Tensor) -> None:
        rows_PV = self.head.prototypes_DPV[index, : self.head.num_prototypes_D[index]]
        self.head.set_rows(index, recentre(keys_NV, rows_PV, (self.encoder.width, NOVEL_WIDTH)))


class _Saved(BaseModel):
    """What the tensors alone do not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    domains: tuple[str, ...]
    num_table_rows: int = Field(ge=1, le=2**28)
    width: int = Field(ge=1, le=2**16)
    threshold: float = Field(allow_inf_nan=False)
    data_free: tuple[str, ...] = ()
    sentence_checksum: str | None = None
    """Of the pretrained sentence encoder beside, if there is one."""


def _load_sentences(folder: Path, expected_checksum: str) -> SentenceModel:
    if checksum(folder) != expected_checksum:
        raise CorruptArtifact("The router's sentence encoder is not the one it was trained with; train it again.")
    return SentenceModel.load(folder)


def _own_logit(raw_BC: Tensor, labels_B: Tensor) -> Tensor:
    """The mean logit of prompts of a domain for that domain; those of none do not count."""
    known_B = labels_B < raw_BC.shape[1] - 1
    return raw_BC[known_B].gather(1, labels_B[known_B][:, None]).mean()
