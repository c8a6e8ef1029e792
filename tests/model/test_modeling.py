"""Zephyra Fusion against a slow reference of our own, against Qwen3, and against what transformers promises."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cluster.lora.weights import adaptable_layers
from cluster.model import ZephyraFusionConfig, ZephyraFusionForCausalLM
from cluster.model.configuration_zephyra import SIZES
from tests.model.nano import logits, nano_model, random_ids
from tests.model.reference import reference_logits

both = pytest.mark.parametrize("feed_forward", ["relu2", "swiglu"])


@both
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "head_dim": 24}])
def test_a_forward_pass_is_what_the_slow_reference_computes(feed_forward: str, shape: dict[str, int]) -> None:
    model = nano_model(feed_forward=feed_forward, rope_theta=100.0, **shape)
    ids_BT = random_ids(model, 1, 7)
    expected_TV = reference_logits(dict(model.state_dict()), model.config, ids_BT[0].tolist())
    torch.testing.assert_close(logits(model, ids_BT)[0].double(), expected_TV, rtol=1e-4, atol=1e-4)


def test_swiglu_is_qwen3_when_the_weights_are() -> None:
    ours = nano_model(feed_forward="swiglu")
    shape = ours.config.to_dict()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            **{key: shape[key] for key in same},
            rope_parameters={"rope_type": "default", "rope_theta": ours.config.rope_theta},
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids_BT = random_ids(ours, 3, 40)
    torch.testing.assert_close(logits(ours, ids_BT), logits(theirs, ids_BT), rtol=1e-5, atol=1e-5)


@both
def test_saved_and_loaded_by_the_auto_classes_it_is_the_same(tmp_path: Path, feed_forward: str) -> None:
    model = nano_model(feed_forward=feed_forward)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is ZephyraFusionForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).feed_forward == feed_forward
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids_BT = random_ids(model, 2, 9)
    assert torch.equal(logits(loaded, ids_BT), logits(model, ids_BT))


@both
def test_generate_with_its_cache_says_what_full_passes_say(feed_forward: str) -> None:
    model = nano_model(feed_forward=feed_forward)
    ids_BT = random_ids(model, 2, 6)
    got_BT = model.generate(
        ids_BT, max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids_BT)
    )
    expected_BT = ids_BT
    for _ in range(12):
        expected_BT = torch.cat([expected_BT, logits(model, expected_BT)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got_BT, expected_BT)


def test_padding_at_the_left_changes_no_answer() -> None:
    model = nano_model()
    short, long = random_ids(model, 1, 4), random_ids(model, 1, 9, seed=2)
    padded_BT = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1), long])
    mask_BT = torch.ones_like(padded_BT)
    mask_BT[0, :5] = 0
    together_BT = model.generate(padded_BT, attention_mask=mask_BT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, ids_BT in enumerate((short, long)):
        mask = torch.ones_like(ids_BT)
        alone_BT = model.generate(ids_BT, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(together_BT[row, 9:], alone_BT[0, ids_BT.shape[1] :])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_packed_into_one_row_do_not_see_each_other(attention: str) -> None:
    model = nano_model(attn_implementation=attention)
    first, second = random_ids(model, 1, 5), random_ids(model, 1, 8, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(8)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], logits(model, first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], logits(model, second), rtol=1e-5, atol=1e-5)


def test_logits_to_keep_and_labels_are_those_of_transformers() -> None:
    model = nano_model()
    ids_BT = random_ids(model, 2, 7)
    with torch.no_grad():
        out = model(input_ids=ids_BT, labels=ids_BT)
        assert torch.equal(model(input_ids=ids_BT, logits_to_keep=2).logits, out.logits[:, -2:])
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)


def test_a_fresh_model_has_normal_weights_and_norms_of_one() -> None:
    torch.manual_seed(0)
    model = ZephyraFusionForCausalLM(ZephyraFusionConfig(initializer_range=0.03))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.03, rel=0.1), name
            assert abs(float(parameter.detach().mean())) < 0.003, name


@both
def test_peft_finds_exactly_the_adaptable_layers(feed_forward: str) -> None:
    model = nano_model(feed_forward=feed_forward)
    ours = set(adaptable_layers(model))
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in ours} == kinds | ({"gate_proj"} if feed_forward == "swiglu" else set())
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=1))
    found = {name.partition(".lora_A")[0] for name, _ in peft.base_model.model.named_parameters() if ".lora_A." in name}
    assert found == ours


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [
        ("nano", 0.05e6, 0.2e6),
        ("starter", 0.8e6, 0.95e6),
        ("small", 6.5e6, 7.5e6),
        ("medium", 118e6, 130e6),
        ("large", 0.95e9, 1.1e9),
    ],
)
def test_named_sizes_have_about_the_parameters_that_they_say(size: str, low: float, high: float) -> None:
    config = ZephyraFusionConfig(**SIZES[size])
    with torch.device("meta"):
        model = ZephyraFusionForCausalLM(config)
    assert low <= model.num_parameters() <= high
    query, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    attention = config.hidden_size * (2 * query + 2 * key_value) + 2 * config.head_dim
    feed_forward = 2 * config.hidden_size * config.intermediate_size
    layer = attention + feed_forward + 2 * config.hidden_size
    by_hand = config.num_hidden_layers * layer + config.hidden_size * (config.vocab_size + 1)
    assert model.num_parameters() == by_hand


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="feed_forward is 'gelu'; expected 'relu2' or 'swiglu'"):
        ZephyraFusionConfig(feed_forward="gelu")
    with pytest.raises(ValueError, match="4 attention heads cannot share 3"):
        ZephyraFusionConfig(num_attention_heads=4, num_key_value_heads=3)
