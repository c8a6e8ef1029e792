"""The grammar of the starter's domains: for each, what its prompts look like and what the one right answer is.

Fact domains hold out phrasings: validation and test ask in sentences that training never used. The others hold out
cases: a number, a date or a query is asked in one split only.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from random import Random

from cluster.training.starter.facts import (
    CAPITALS,
    ELEMENTS,
    FILES,
    METRIC,
    METRIC_DIGITS,
    OPPOSITES,
    SPANISH,
    TABLES,
)

SPLITS = ("train", "val", "test")

Case = tuple[str, str]
"""A prompt and its answer."""


_FRAMES = (
    *(
        "What is {np}?",
        "Tell me {np}.",
        "Name {np}, please.",
        "Give me {np}.",
        "I need {np}.",
        "Do you know {np}?",
        "{np}",
    ),
    *("Could you say what {np} is?", "I forgot {np}.", "Please find {np}.", "Write down {np}.", "What would be {np}?"),
    *("My question is: {np}?", "Hello, I am looking for {np}.", "And {np}?", "Let me know {np}, thanks.", "{np} is"),
    *("Today I have to learn {np}.", "Quick, {np}!", "Which one is {np}?", "Remind me of {np}.", "Say {np}."),
    *(
        "What's {np}?",
        "Can you find {np}?",
        "I wonder about {np}.",
        "Would you give me {np}?",
        "Any idea what {np} is?",
    ),
    *("Look up {np}.", "Is there {np}?", "{np}: please answer in one word.", "You surely know {np}.", "Provide {np}."),
)
"""Ways to ask for something, in training; `{np}` is what is asked for."""


class FactDomain:
    """A table to know by heart. Each split asks for every entry, in sentences of its own with a gap `{x}`.

    Training combines `nouns`, names of what is asked for, with frames, and adds `train`; validation and test have
    sentences that training never uses.
    """

    def __init__(
        self,
        table: Mapping[str, str],
        nouns: Sequence[str],
        train: Sequence[str],
        val: Sequence[str],
        test: Sequence[str],
    ) -> None:
        self._table, self._keys = table, list(table)
        # Each sentence of `train` as often as all frames over one noun: they differ most from one another.
        framed = [frame.replace("{np}", noun) for frame in _FRAMES for noun in nouns]
        self.phrasings = {"train": framed + [*train] * 6, "val": val, "test": test}

    def case(self, rng: Random, split: str) -> Case:
        key = rng.choice(self._keys)
        return rng.choice(self.phrasings[split]).format(x=key), self._table[key]


class CaseDomain:
    """A skill: answers follow from what is asked. `draw` gives the fields of a case, of which `answer` is one.

    `note` is how the same case would be put in a few signs: for the base, so that it has seen such things before.
    """

    def __init__(self, draw: Callable[[Random], Mapping[str, str]], phrasings: Sequence[str], note: str) -> None:
        self._draw, self._phrasings, self._note = draw, phrasings, note

    def case(self, rng: Random, split: str) -> Case:
        fields = self._fields(rng, split)
        return rng.choice(self._phrasings).format(**fields), fields["answer"]

    def note(self, rng: Random) -> Case:
        """A case of the train split in shorthand."""
        fields = self._fields(rng, "train")
        return self._note.format(**fields), fields["answer"]

    def _fields(self, rng: Random, split: str) -> Mapping[str, str]:
        while True:
            fields = self._draw(rng)
            if _split_of(fields["answer"]) == split:
                return fields


def _split_of(answer: str) -> str:
    """80 % train, 10 % each of the others, by a hash, so that no answer is asked for in two splits."""
    bucket = hashlib.blake2b(answer.encode(), digest_size=2).digest()[0] % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


def roman(number: int) -> str:
    """`number` in Roman numerals, 1 to 3999."""
    digits = ((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"))
    out = ""
    for value, symbol in (*digits, (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        count, number = divmod(number, value)
        out += symbol * count
    return out


def _roman(rng: Random) -> Mapping[str, str]:
    number = rng.randint(1, 399)
    return {"n": str(number), "answer": roman(number)}


def _units(rng: Random) -> Mapping[str, str]:
    kind = rng.choice(list(METRIC))
    large, small = sorted(rng.sample(METRIC[kind], 2), key=lambda unit: -METRIC_DIGITS[unit])
    number = rng.randint(1, 99)
    zeros = "0" * (METRIC_DIGITS[large] - METRIC_DIGITS[small])
    return {"n": str(number), "a": large, "b": small, "answer": f"{number}{zeros} {small}"}


def _sql(rng: Random) -> Mapping[str, str]:
    table = rng.choice(list(TABLES))
    shown, where = rng.sample(TABLES[table], 2)
    value = rng.randint(2, 99)
    word, sign = rng.choice((("above", ">"), ("below", "<"), ("equal to", "=")))
    answer = f"SELECT {shown} FROM {table} WHERE {where} {sign} {value};"
    return {"s": shown, "t": table, "w": where, "o": word, "v": str(value), "answer": answer}


def _shell(rng: Random) -> Mapping[str, str]:
    first, second = rng.sample(FILES, 2)
    task, answer = rng.choice(
        (
            ("copy the file {a} to {b}", "cp {a} {b}"),
            ("rename the file {a} to {b}", "mv {a} {b}"),
            ("list the folder {a}", "ls {a}"),
            ("delete the file {a}", "rm {a}"),
            ("make a folder called {a}", "mkdir {a}"),
            ("show the contents of the file {a}", "cat {a}"),
            ("count the lines of the file {a}", "wc -l {a}"),
            ("find the word {a} in the file {b}", "grep {a} {b}"),
        )
    )
    return {"task": task.format(a=first, b=second), "answer": answer.format(a=first, b=second)}


DOMAINS: dict[str, FactDomain | CaseDomain] = {
    "capitals": FactDomain(
        CAPITALS,
        nouns=("the capital of {x}", "{x}'s capital", "the capital city of {x}"),
        train=(
            "Name the capital of {x}.",
            "Which city is the capital of {x}?",
            "{x}'s capital city?",
            "The capital of {x} is",
            "capital of {x}",
            "Which town do the ministers of {x} meet in?",
            "What city is the seat of government of {x}?",
            "From which city is {x} governed?",
            "Where is the government of {x}?",
            "If I go to {x}, what is its capital?",
            "Country: {x}. Capital:",
            "Which capital belongs to {x}?",
            "{x}: which city governs it?",
            "For {x}, name the capital.",
            "{x} - and its capital city?",
            "About {x}: where is its capital?",
            "In {x}, the capital is called",
            "Do you know what the capital of {x} is called?",
        ),
        val=(
            "Please name the capital city of {x}.",
            "Which capital does {x} have?",
            "Can you tell me the capital of {x}?",
            "Which city is {x}'s capital?",
            "Give the capital of {x}.",
        ),
        test=(
            "{x} has which capital?",
            "Which city serves as the capital of {x}?",
            "What is the capital city of {x} called?",
        ),
    ),
    "chemistry": FactDomain(
        ELEMENTS,
        nouns=("the chemical symbol of {x}", "the symbol for the element {x}", "{x}'s symbol in chemistry"),
        train=(
            "Chemical symbol for {x}",
            "Give the symbol of the element {x}.",
            "Which symbol does {x} have in the periodic table?",
            "How is {x} written in the periodic table?",
            "The symbol for the element {x} is",
            "symbol of {x}",
            "In a formula, {x} is shortened to",
            "In chemistry, what symbol stands for {x}?",
            "What do chemists write for {x}?",
            "Element: {x}. Symbol:",
            "Which abbreviation is used for {x} in chemistry?",
            "What letters denote {x}?",
            "How do you abbreviate the element {x}?",
            "Find {x} in the periodic table and give its symbol.",
            "{x}: which symbol?",
            "For {x}, name the symbol.",
            "{x} is an element whose symbol is",
        ),
        val=(
            "Name the chemical symbol of {x}.",
            "Which chemical symbol does {x} have?",
            "What symbol does the element {x} have?",
            "Give the chemical symbol for {x}.",
            "{x}'s chemical symbol?",
        ),
        test=(
            "Which chemical symbol stands for {x}?",
            "State the chemical symbol of {x}.",
            "What is {x}'s chemical symbol?",
        ),
    ),
    "spanish": FactDomain(
        SPANISH,
        nouns=("the Spanish word for {x}", "the Spanish translation of {x}", "{x} in Spanish"),
        train=(
            "How do you say {x} in Spanish?",
            "Translate {x} into Spanish.",
            "Spanish for {x}",
            "In Spanish, {x} is",
            "What do Spanish speakers call a {x}?",
            "Translate the English word {x} to Spanish.",
            "I want to say {x} in Spanish.",
            "English: {x}. Spanish:",
            "Put {x} into Spanish.",
            "My Spanish teacher asked me for {x}.",
            "The word {x}, in Spanish please",
            "What would a {x} be in Spanish?",
            "{x}: which word is that in Spanish?",
            "For {x}, name the Spanish word.",
            "{x} - how do they say it in Spain?",
            "{x} becomes what in Spanish?",
            "{x} as a Spanish word",
            "{x} when speaking Spanish is",
            "{x}? In Spanish, please.",
            "{x}, but in Spanish",
            "The Spanish for a {x} is which word?",
        ),
        val=(
            "Please say {x} in Spanish.",
            "What does {x} mean in Spanish?",
            "How is {x} called in Spanish?",
            "Give the Spanish word for {x}.",
            "Please translate {x} to Spanish.",
        ),
        test=(
            "How would one say {x} in Spanish?",
            "What is the word for {x} in Spanish?",
            "{x} translated into Spanish",
        ),
    ),
    "opposites": FactDomain(
        OPPOSITES,
        nouns=("the opposite of {x}", "an antonym of {x}", "the contrary of {x}"),
        train=(
            "Opposite of {x}",
            "Give an antonym of {x}.",
            "Which word means the opposite of {x}?",
            "The opposite of {x} is",
            "Name the antonym for {x}.",
            "antonym: {x}",
            "Word: {x}. Opposite:",
            "Reverse the meaning of {x}.",
            "If it is not {x}, then it is",
            "Which adjective is contrary to {x}?",
            "What would you say to mean the opposite of {x}?",
            "{x}: which word is its opposite?",
            "For {x}, name the opposite.",
            "{x} has the antonym",
            "Not {x} at all, but the opposite:",
        ),
        val=(
            "Which word is the antonym of {x}?",
            "Find me the opposite of {x}.",
            "What word is the opposite of {x}?",
            "Give the opposite of {x}.",
            "What is an antonym for {x}?",
        ),
        test=(
            "Which word is opposite to {x}?",
            "State the opposite of {x}.",
            "What is the opposite word of {x}?",
        ),
    ),
    "roman": CaseDomain(
        _roman,
        (
            "Write {n} in Roman numerals.",
            "What is {n} as a Roman numeral?",
            "{n} in Roman numerals",
            "Convert {n} to Roman numerals.",
            "Roman numeral for {n}",
            "How did the Romans write {n}?",
        ),
        "{n} ~",
    ),
    "units": CaseDomain(
        _units,
        (
            "Convert {n} {a} to {b}.",
            "How many {b} are {n} {a}?",
            "{n} {a} in {b}",
            "What is {n} {a} in {b}?",
            "Express {n} {a} in {b}.",
            "Change {n} {a} into {b}.",
        ),
        "{n} {a} = ? {b}",
    ),
    "sql": CaseDomain(
        _sql,
        (
            "Select the {s} of all {t} whose {w} is {o} {v}.",
            "SQL: the {s} of {t} with {w} {o} {v}",
            "Write a query for the {s} of every row in {t} where {w} is {o} {v}.",
            "Query the {t} table for {s} where the {w} is {o} {v}.",
        ),
        "-- {s} of {t}, {w} {o} {v}",
    ),
    "shell": CaseDomain(
        _shell,
        (
            "Shell command to {task}",
            "How do I {task} in the shell?",
            "In the terminal, {task}.",
            "Which command can {task}?",
            "bash: {task}",
        ),
        "# {task}",
    ),
}
"""The domains by name."""
