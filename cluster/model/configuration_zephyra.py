"""The shape of a Zephyra Fusion model, and its named sizes."""

from typing import Any, Literal

from transformers import PreTrainedConfig


class ZephyraFusionConfig(PreTrainedConfig):
    """Configuration of Zephyra Fusion: a pre-norm decoder with RMSNorm, RoPE, grouped-query attention, QK-norm and
    tied embeddings. Without arguments it is the `nano` size.
    """

    model_type = "zephyra_fusion"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 16,
        feed_forward: Literal["relu2", "swiglu"] = "relu2",
        max_position_embeddings: int = 512,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        `intermediate_size` is the width between the feed-forward layers. `feed_forward` is `relu2` (two layers with
        squared ReLU between: So et al. 2021, arXiv 2109.08668) or `swiglu` (three: Shazeer 2020, arXiv 2002.05202).
        `max_position_embeddings` bounds prompt and answer together, in tokens.
        """
        if feed_forward not in ("relu2", "swiglu"):
            raise ValueError(f"feed_forward is {feed_forward!r}; expected 'relu2' or 'swiglu'.")
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} attention heads cannot share {num_key_value_heads} key-value heads; "
                "expected a divisor."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.feed_forward = feed_forward
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)


SIZES: dict[str, dict[str, Any]] = {
    # name: about how many parameters at its usual vocabulary; what it is for
    "nano": {},  # 0.1M: tests
    "starter": {  # 0.9M: the starter system, trained in a minute
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "mini": {  # 3M: the open domains, in minutes on two cores
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    },
    "small": {  # 7M
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
    },
    "medium": {  # 124M
        "vocab_size": 32768,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 15,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "rope_theta": 100_000.0,
    },
    "large": {  # 1.0B: on paper
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rope_theta": 100_000.0,
    },
}
"""Named sizes, as arguments of `ZephyraFusionConfig`."""
