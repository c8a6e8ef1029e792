"""What belongs to no domain. Small talk and requests that nobody here can answer, for the base and for the router;
and for the base alone: exercises in following a prompt and copying from it, notes in the manner of the domains, and
questions of the domains with the answer that it does not know.
"""

from random import Random

from cluster.training.starter.domains import DOMAINS, Case, CaseDomain
from cluster.training.starter.facts import (
    CAPITALS,
    ELEMENTS,
    FILES,
    METRIC_DIGITS,
    MONTHS,
    OPPOSITES,
    PEOPLE,
    SPANISH,
    TABLES,
)

UNKNOWN = "I do not know that. I am a small model with a few domains."
"""What the base says where a domain would be needed, and where none would help."""

_GREETINGS = (
    *("Hello!", "Hi there", "Good morning!", "Hey, how are you?", "Good evening", "Hello, who are you?", "Hi!"),
    *("Hello again", "Nice to meet you.", "Good afternoon!"),
)
_THANKS = (
    *("Thank you!", "Thanks a lot", "That was helpful, thanks.", "Great, thank you", "Bye!", "See you tomorrow."),
    *("Thanks, goodbye", "Many thanks!", "That will be all.", "Good night"),
)

_TOPICS = (
    *("the weather in the mountains", "a football match", "my garden", "a long train ride", "jazz music", "chess"),
    *("the French Revolution", "black holes", "a birthday party", "my knee pain", "a broken bicycle", "tax law"),
    *("a good novel", "vegetable soup", "a job interview", "my neighbour's noisy parrot", "the stock market", "yoga"),
    *("climate change", "learning the piano", "a movie about pirates", "dinosaurs", "a wedding speech", "insomnia"),
    *("car insurance", "the moon landing", "a puppy's training", "house plants", "a camping trip", "old photographs"),
    *("electric cars", "a rainy weekend", "a visit to the dentist", "modern art", "quantum physics", "baking cookies"),
    *("a marathon", "my science homework", "the history of tea", "video games", "a leaking tap", "a love letter"),
    *("rental contracts", "headaches", "world population", "bees", "volcanoes", "a lost passport", "the news today"),
)

_REQUESTS = (
    *("Write a poem about {t}.", "Tell me a story about {t}.", "What do you think about {t}?", "Explain {t} to me."),
    *("Give me some advice on {t}.", "Who knows most about {t}?", "Why is everybody talking about {t}?"),
    *(
        "Summarize what you know about {t}.",
        "Help me with {t}, please.",
        "I am worried about {t}.",
        "How does {t} work?",
    ),
    *("When did {t} become popular?", "Recommend a book about {t}.", "Let us talk about {t}.", "Is {t} dangerous?"),
    *("Write an email about {t} to my boss.", "Make a joke about {t}.", "How much does {t} cost?", "{t}"),
    *("My friend {p} asked me about {t}.", "What would {p} say about {t}?", "Plan a day around {t} for {p}."),
    *(
        "Draw a picture of {t}.",
        "What should I cook before {t}?",
        "Compare {t} with {u}.",
        "Where can I learn about {t}?",
    ),
    *("Debug my Python program about {t}.", "Which is better, {t} or {u}?", "Prove a theorem about {t}."),
    *("Compose a song that mentions {t} and {u}.", "What are the causes of {t}?", "Who won the prize for {t}?"),
)


def _words() -> tuple[str, ...]:
    tables = (CAPITALS, ELEMENTS, SPANISH, OPPOSITES)
    return tuple(
        sorted(
            {word for table in tables for entry in table.items() for word in entry}
            | set(FILES)
            | set(MONTHS)
            | set(METRIC_DIGITS)
            | set(TABLES)
            | {c for t in TABLES.values() for c in t}
        )
    )


_WORDS = _words()


def invented_word(rng: Random) -> str:
    """Letters that make no word, so that a word never seen before is nothing new."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))


def _thing(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return str(rng.randint(1, 2050))
    return invented_word(rng) if draw < 0.4 else rng.choice(_WORDS)


def _things(rng: Random, count: int) -> list[str]:
    """Words and numbers to copy: as varied as what the domains speak of."""
    return [_thing(rng) for _ in range(count)]


def chat(rng: Random, split: str = "train") -> Case:
    """A prompt of no domain and the base's honest answer. Validation and test ask of other topics in other words."""
    held_out = {"train": (0, 1), "val": (1, 2), "test": (2, 3)}[split]

    def share(of: tuple[str, ...]) -> tuple[str, ...]:
        cuts = (0, len(of) * 7 // 10, len(of) * 8 // 10, len(of))
        return of[cuts[held_out[0]] : cuts[held_out[1]]]

    draw = rng.random()
    if draw < 0.06:
        return rng.choice(share(_GREETINGS)), "Hello! How can I help you?"
    if draw < 0.1:
        return rng.choice(share(_THANKS)), "You are welcome."
    topic, other = rng.sample(share(_TOPICS), 2)
    return rng.choice(share(_REQUESTS)).format(t=topic, u=other, p=rng.choice(PEOPLE)), UNKNOWN


def exercise(rng: Random) -> Case:
    """Follow a prompt: repeat, pick, order, spell. The answer is always made of what the prompt holds."""
    things = _things(rng, rng.randint(2, 5))
    listed = " ".join(things)
    word = rng.choice(_WORDS)
    number = rng.randint(1, 9999)
    prompt, answer = rng.choice(
        (
            (f"Repeat: {listed}", listed),
            (f"Say {things[0]} and {things[-1]}.", f"{things[0]} {things[-1]}"),
            (f"First of: {listed}", things[0]),
            (f"Last of: {listed}", things[-1]),
            (f"Backwards: {listed}", " ".join(reversed(things))),
            (f"{listed}: backwards", " ".join(reversed(things))),
            (f"{listed}: the last one", things[-1]),
            (f"{word} or {things[0]}?", f"{things[0]} or {word}"),
            (f"Put a dash between: {listed}", "-".join(things)),
            (f"Put {things[0]} after {things[1]}.", f"{things[1]} {things[0]}"),
            (f"Repeat the word {word}.", word),
            (f"The digits of {number}", " ".join(str(number))),
            (f"Write {number} and then a zero.", f"{number}0"),
        )
    )
    return prompt, answer


def note(rng: Random) -> Case:
    """A case of some skill in shorthand, with no question asked."""
    skills = [domain for domain in DOMAINS.values() if isinstance(domain, CaseDomain)]
    return rng.choice(skills).note(rng)


def refusal(rng: Random) -> Case:
    """A question of some domain, which the base by itself does not answer."""
    prompt, _ = rng.choice(list(DOMAINS.values())).case(rng, "train")
    return prompt, UNKNOWN
