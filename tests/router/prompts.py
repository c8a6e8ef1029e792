"""A small world of domains for the router's tests: sentences with gaps, some of them held out for validation."""

from random import Random

_NOUNS = ("lamp", "river", "paper", "garden", "window", "bottle", "engine", "basket", "mirror", "hammer", "blanket")
_SENTENCES = {
    "cooking": (
        ("How long do I bake {x}?", "Recipe for soup with {x}", "Which spice goes with {x}?", "Fry {x} in a pan."),
        ("How long should I fry {x}?", "Which recipe is for a soup with {x}?"),
    ),
    "music": (
        (
            "Play the song {x} on the piano",
            "Which chord begins {x}?",
            "Sing the melody of {x}",
            "Notes of the song {x}",
        ),
        ("Play the melody of {x}", "Which notes has the chord {x}?"),
    ),
    "sql": (
        ("SELECT {x} FROM table", "Query all rows where {x} is null", "Count rows of table {x}", "Join table {x}"),
        ("Count all rows where {x} is null", "SELECT rows FROM table {x}"),
    ),
    "weather": (
        ("Will it rain in {x}?", "Forecast of snow for {x}", "Temperature tomorrow in {x}", "Is it windy in {x}?"),
        ("Will it snow tomorrow in {x}?", "Forecast of rain and temperature for {x}"),
    ),
}

DOMAINS = tuple(sorted(_SENTENCES))

STRANGE = (
    "Who discovered penicillin?",
    "My knee hurts when climbing stairs",
    "public static void main(String[] args)",
    "Guten Tag, wie geht es Ihnen?",
    "Please cancel my subscription",
    "xqzt brrr",
    "Explain general relativity",
    "\N{GRINNING FACE}",
)
"""Prompts of no domain, in words that none of the sentences has."""


def prompts(split: str, num_per_domain: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts and their domains; `split` is train or val, which share no sentence."""
    rng = Random(f"{seed} {split}")
    texts, domains = [], []
    for domain in DOMAINS:
        sentences = _SENTENCES[domain][0 if split == "train" else 1]
        for _ in range(num_per_domain):
            texts.append(rng.choice(sentences).format(x=rng.choice(_NOUNS)))
            domains.append(domain)
    return texts, domains
