"""The workload that every system is timed on: prompts of 52 tokens, 64 new ones each, greedy, no early end.

The prompts are those of the scripts that time the peers, in which only the repeated word changes from run to run:
prompts have not been seen before, and all have the same number of tokens. Knows nothing of engines.
"""

from collections.abc import Callable
from itertools import count

from transformers import PreTrainedTokenizerBase

from cluster.messages import GenerateRequest, Mixture, SamplingParams

MixtureOf = Callable[[int], Mixture]
"""The mixture of the i-th request."""

_PROMPT_NUMBERS = 16
_WORDS = (
    "os",
    "re",
    "io",
    "ast",
    "dis",
    "pdb",
    "cmd",
    "sys",
    "abc",
    "time",
    "math",
    "copy",
    "glob",
    "gzip",
    "hmac",
    "html",
    "code",
    "enum",
    "uuid",
    "string",
    "types",
    "queue",
    "shutil",
    "socket",
    "random",
    "struct",
)


class Workload:
    """Makes requests, each run's from prompts of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        lengths = {word: len(tokenizer(prompt(0, word, word))["input_ids"]) for word in _WORDS}
        self._words = [word for word in _WORDS if lengths[word] == lengths[_WORDS[0]]]
        self._numbers = count()
        self._num_sets = 0

    def requests(
        self, num_requests: int, mixture_of: MixtureOf, new_tokens: Callable[[int], int] | None = None
    ) -> list[GenerateRequest]:
        """So many requests, of exactly `new_tokens(i)` tokens each; by default of all."""
        return [
            GenerateRequest(
                request_id=str(next(self._numbers)),
                prompt=self._next_prompt(i),
                mixture=mixture_of(i),
                sampling=SamplingParams(
                    max_tokens=self.new_tokens if new_tokens is None else new_tokens(i), ignore_eos=True
                ),
            )
            for i in range(num_requests)
        ]

    def _next_prompt(self, index: int) -> str:
        number = index % _PROMPT_NUMBERS
        if number == 0:
            self._num_sets += 1
        second, first = divmod(self._num_sets, len(self._words))
        return prompt(number, self._words[first], self._words[second % len(self._words)])


def prompt(number: int, first: str, second: str) -> str:
    """A line of code that goes on and on."""
    return f"def foo{number}(self, x): return x+" + f"import {first} " * 10 + f"import {second} " * 10
