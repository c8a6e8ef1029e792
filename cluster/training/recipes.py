"""The recipes: settings of all four stages by name."""

from cluster.config.training import AdapterSettings, BaseSettings, JointSettings, Recipe, RouterSettings
from cluster.errors import InvalidInput

_MINI_BASE = BaseSettings(
    size="mini", general_only=False, num_steps=1000, tokens_per_batch=2048, max_tokens=384, learning_rate=2e-3
)
"""Learns from all domains, for some eight minutes on two cores."""

_REAL_PROMPTS = RouterSettings(
    steps=800, outlier_rate=0.1, hidden_domain_rate=0.25, word_dropout=0.1, word_omission=0.3, naive_bayes=True
)
"""For prompts that people wrote: some words, and some domains, are hidden or left out at each step."""

RECIPES: dict[str, Recipe] = {
    # Trained in under three minutes on two cores: the data of cluster.training.starter.
    "starter": Recipe(router=RouterSettings(steps=500)),
    # For a base that was trained by others: small steps, and nothing that hangs on the starter's size.
    "pretrained": Recipe(
        adapters=AdapterSettings(
            rank=16, alpha=32, num_steps=200, tokens_per_batch=2048, max_tokens=512, learning_rate=2e-4
        ),
        joint=JointSettings(
            num_steps=20, rows_per_domain=1, max_tokens=512, adapter_learning_rate=2e-5, router_learning_rate=1e-4
        ),
        dtype="auto",
    ),
    # A minute for a handful of domains: shows that all stages take the data, not what they could give.
    "trial": Recipe(
        base=BaseSettings(general_only=False, num_steps=100, tokens_per_batch=1024, max_tokens=256, learning_rate=2e-3),
        adapters=AdapterSettings(
            rank=4, alpha=8, num_steps=12, tokens_per_batch=512, max_tokens=256, learning_rate=4e-3
        ),
        router=RouterSettings(steps=100),
        joint=JointSettings(num_steps=4, rows_per_domain=1, adapter_learning_rate=1e-4),
        train_rows_per_domain=1000,
        val_rows_per_domain=20,
    ),
    # 13 real domains in under 25 minutes on two cores.
    "open-domains": Recipe(
        base=_MINI_BASE,
        adapters=AdapterSettings(
            rank=8, alpha=16, num_steps=110, tokens_per_batch=1536, max_tokens=384, learning_rate=2e-3
        ),
        router=_REAL_PROMPTS,
        joint=JointSettings(num_steps=20, rows_per_domain=1, max_tokens=384, adapter_learning_rate=1e-4),
        dtype="auto",
        train_rows_per_domain=4000,
        val_rows_per_domain=40,
    ),
    # Hundreds of small tasks in one pass. No joint stage: it sends each row through a mixture of all adapters.
    "many-tasks": Recipe(
        base=_MINI_BASE,
        adapters=AdapterSettings(
            rank=4, alpha=8, num_steps=24, tokens_per_batch=512, max_tokens=384, learning_rate=4e-3
        ),
        router=_REAL_PROMPTS,
        joint=JointSettings(num_steps=0),
        dtype="auto",
        val_rows_per_domain=10,
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises `InvalidInput` for any other."""
    if name not in RECIPES:
        raise InvalidInput(f"There is no recipe {name!r}; the recipes are: {', '.join(RECIPES)}.")
    return RECIPES[name]
