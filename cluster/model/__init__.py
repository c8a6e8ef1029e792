"""The base: Zephyra Fusion as a transformers model, its tokenizer, and the loading of any Hugging Face causal LM.

Importing this package registers Zephyra Fusion with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from cluster.model.configuration_zephyra import ZephyraFusionConfig
from cluster.model.modeling_zephyra import ZephyraFusionForCausalLM

# Loading a small model needs no bar, and one would tear ours apart.
logging.disable_progress_bar()

AutoConfig.register(ZephyraFusionConfig.model_type, ZephyraFusionConfig, exist_ok=True)
AutoModelForCausalLM.register(ZephyraFusionConfig, ZephyraFusionForCausalLM, exist_ok=True)

__all__ = ["ZephyraFusionConfig", "ZephyraFusionForCausalLM"]
