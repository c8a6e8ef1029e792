"""What a caller of the engine sees: refusals, chunks, ends, cancellation, figures."""

import time
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cluster.config.serving import EngineSettings
from cluster.engine.engine import Engine, end_of_sequence_ids
from cluster.errors import CorruptArtifact, DeadlineExceeded, IncompatibleAdapter, InvalidInput, PromptTooLong
from cluster.lora.weights import AdapterWeights, Factors
from cluster.messages import ChatMessage, FinishReason, GenerateRequest, Mixture, Role, SamplingParams
from cluster.model.base import Base, encode_prompt
from tests.engine.systems import (
    CONTEXT_TOKENS,
    FINGERPRINT,
    MIXTURES,
    PROMPTS,
    RUNNERS,
    System,
    adapters,
    bytes_of,
    make_base,
    ref,
    reference,
    request,
    tokenizer,
)

LAW = Mixture.of({ref("law"): 1.0})


def decode(ids: list[int]) -> str:
    return tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_what_cannot_fit_the_context_is_refused_and_what_just_fits_is_not():
    system = System()
    num_prompt = len(encode_prompt(tokenizer(), PROMPTS[0]))
    room = CONTEXT_TOKENS - num_prompt
    with pytest.raises(PromptTooLong, match=f"{num_prompt} tokens and max_tokens is {room + 1}.*{CONTEXT_TOKENS}"):
        system.submit(request("r", PROMPTS[0], max_tokens=room + 1))
    system.submit(request("r", PROMPTS[0], max_tokens=room))
    assert system.run()["r"].token_ids == reference("zephyra", PROMPTS[0], Mixture(), room).token_ids


@pytest.mark.parametrize("prompt", ["", "  ", "\ud800"])
def test_a_prompt_that_cannot_be_is_refused(prompt):
    with pytest.raises(InvalidInput):
        System().engine.submit(GenerateRequest("r", prompt, Mixture(), SamplingParams()))


def test_a_context_beyond_the_bases_is_refused():
    with pytest.raises(InvalidInput, match=f"max_context_tokens is {CONTEXT_TOKENS + 1}"):
        Engine(make_base(), EngineSettings(max_context_tokens=CONTEXT_TOKENS + 1))


def test_a_base_with_a_sliding_window_is_refused_unless_the_context_lies_within():
    config = {
        "vocab_size": 340,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "sliding_window": 64,
    }
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    base = Base(MistralForCausalLM(MistralConfig(**config)).eval(), tokenizer(), FINGERPRINT, "windowed")
    with pytest.raises(InvalidInput, match=r"sliding_attention \(window 64\)"):
        Engine(base, EngineSettings())
    Engine(base, EngineSettings(max_context_tokens=64))


def test_chunks_join_to_the_answer_and_the_last_one_says_why():
    system = System()
    for index, prompt in enumerate(PROMPTS):
        system.submit(request(f"r{index}", prompt, MIXTURES[index], max_tokens=20))
    for index, seen in enumerate(system.run().values()):
        expected = reference("zephyra", PROMPTS[index], MIXTURES[index], 20).token_ids
        assert seen.token_ids == expected
        assert seen.text == decode(expected)
        assert seen.finish_reason is (FinishReason.LENGTH if len(expected) == 20 else FinishReason.STOP)
        assert seen.prompt_tokens == len(encode_prompt(tokenizer(), PROMPTS[index]))
        assert all(seen.texts[:-1]), "only the last chunk may be empty"


def test_a_stop_string_cuts_the_text_and_ends_the_sequence():
    expected = reference("zephyra", PROMPTS[1], Mixture(), 20)
    text = decode(expected.token_ids)
    stop = text[6:9]
    system = System()
    system.submit(request("r", max_tokens=20, stop=(stop, "never said")))
    seen = system.run()["r"]
    assert seen.text == text[: text.index(stop)]
    assert seen.finish_reason is FinishReason.STOP
    assert len(seen.token_ids) < 20


@pytest.mark.parametrize("as_list", [False, True])
def test_the_end_of_sequence_ends_and_is_no_text(as_list):
    """The third token of the answer is declared the end, by the generation settings."""
    expected = reference("zephyra", PROMPTS[1], Mixture(), 20).token_ids
    end = expected[2]
    base = make_base()
    base.model.generation_config.eos_token_id = [end, 1] if as_list else end
    engine = Engine(base, EngineSettings())
    engine.submit(request("r", max_tokens=20))
    chunks = []
    while engine.has_work:
        chunks += [output.chunk for output in engine.step()]
    answer = [token for chunk in chunks for token in chunk.token_ids]
    first = expected.index(end)
    assert answer == expected[: first + 1]
    assert chunks[-1].finish_reason is FinishReason.STOP


def test_every_source_of_the_end_of_sequence_counts():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=340, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    model.config.eos_token_id = 5
    model.generation_config.eos_token_id = [6, 7]
    assert end_of_sequence_ids(Base(model, tokenizer(), FINGERPRINT, "x")) == {5, 6, 7, tokenizer().eos_token_id}


def test_chat_and_completion_of_one_prompt_give_the_same():
    system = System()
    system.submit(request("text"))
    chat = (ChatMessage(Role.USER, PROMPTS[1]),)
    system.submit(GenerateRequest("chat", chat, Mixture(), SamplingParams(max_tokens=8)))
    seen = system.run()
    assert seen["chat"].token_ids == seen["text"].token_ids


def test_cancelling_frees_all_at_once_and_no_chunk_follows():
    system = System(max_batch_size=2)
    for request_id in ("runs", "other", "waits"):
        system.submit(request(request_id, mixture=LAW, max_tokens=30))
    system.submit(request("no adapter", mixture=Mixture.of({ref("sql"): 1.0})))
    system.engine.add_adapter(ref("law"), system.adapters[ref("law")])
    system.step()
    system.step()
    before = {r: len(o.texts) for r, o in system.observed.items()}
    for request_id in ("runs", "waits", "no adapter", "never heard of"):
        system.engine.cancel(request_id)
        system.engine.check_integrity()
    stats = system.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    seen = system.run()
    for request_id in ("runs", "waits", "no adapter"):
        assert len(seen[request_id].texts) == before[request_id]
    assert seen["other"].token_ids == reference("zephyra", PROMPTS[1], LAW, 30).token_ids
    system.engine.cancel("other")


def test_an_adapter_that_does_not_belong_is_refused():
    engine, law = System().engine, adapters()[ref("law")]
    name, f = next(iter(law.factors.items()))
    broken = {
        "another base": AdapterWeights(law.factors, "f" * 16),
        "does not have": AdapterWeights({"model.layers.9.mlp.up_proj": f}, FINGERPRINT),
        "the layer needs": AdapterWeights({name: Factors(f.a_RI[:, 1:], f.b_OR, 1.0)}, FINGERPRINT),
        "changes no layer": AdapterWeights({}, FINGERPRINT),
    }
    for message, weights in broken.items():
        with pytest.raises(IncompatibleAdapter, match="trained on base f" if message == "another base" else message):
            engine.add_adapter(ref("law"), weights)
    for scale, value in ((1.0, float("nan")), (1.0, float("inf")), (float("inf"), 1.0), (1e39, 1.0)):
        weights = AdapterWeights({name: Factors(torch.full_like(f.a_RI, value), f.b_OR, scale)}, FINGERPRINT)
        with pytest.raises(CorruptArtifact):
            engine.add_adapter(ref("law"), weights)
    assert engine.stats().resident_adapters == ()


def test_an_adapter_of_another_dtype_is_converted():
    system, weights = System(), adapters()[ref("law")]
    doubled = {n: Factors(f.a_RI.double(), f.b_OR.double(), f.scale) for n, f in weights.factors.items()}
    system.adapters[ref("law")] = replace(weights, factors=doubled)
    system.submit(request("r", mixture=LAW))
    assert system.run()["r"].token_ids == reference("zephyra", PROMPTS[1], LAW, 8).token_ids


def test_figures_add_up():
    system = System(max_batch_size=2)
    for index in range(5):
        system.submit(request(f"r{index}", PROMPTS[index], MIXTURES[index % 3], max_tokens=4))
    seen = system.run()
    stats = system.engine.stats()
    assert stats.num_generated_tokens == sum(len(o.token_ids) for o in seen.values())
    assert stats.num_prompt_tokens + stats.num_reused_tokens == sum(o.prompt_tokens for o in seen.values())
    assert stats.num_finished == 5
    assert set(stats.resident_adapters) == {ref("law"), ref("sql")}
    assert stats.adapter_bytes == sum(bytes_of("zephyra", Mixture.of({r: 1.0})) for r in stats.resident_adapters)
    assert not system.engine.has_work
    assert system.engine.step() == []


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_base_in_bfloat16_answers_as_alone(runner):
    answers = []
    for batch in (1, 4):
        system = System("zephyra", runner, dtype=torch.bfloat16, max_batch_size=batch)
        for index, mixture in enumerate(MIXTURES[:6]):
            system.submit(request(f"r{index}", PROMPTS[index], mixture))
        answers.append({name: seen.token_ids for name, seen in system.run().items()})
    assert all(answers[0].values())
    if runner == "native":  # in torch, the number of rows may change roundings
        assert answers[0] == answers[1]


@pytest.mark.parametrize("runner", RUNNERS)
def test_what_begins_alike_under_the_same_mixture_is_read_once(runner):
    system = System("zephyra", runner)
    prompt = f"{PROMPTS[4]}, {PROMPTS[3]}"
    full_blocks = (len(encode_prompt(tokenizer(), prompt)) - 1) // 16
    assert full_blocks > 1
    expected = 0
    for index, (mixture, is_known) in enumerate([(LAW, False), (LAW, True), (MIXTURES[2], False), (LAW, True)]):
        system.submit(request(f"r{index}", prompt, mixture))
        seen = system.run()[f"r{index}"]
        assert seen.token_ids == reference("zephyra", prompt, mixture, 8).token_ids
        expected += 16 * full_blocks if is_known else 0
        assert system.engine.stats().num_reused_tokens == expected


def test_a_request_that_times_out_says_so_and_frees_all():
    system = System(max_batch_size=1)
    system.submit(replace(request("late", max_tokens=100), timeout_s=0.05))
    system.submit(replace(request("never", mixture=LAW), timeout_s=0.05))
    time.sleep(0.06)
    assert system.engine.has_work
    outputs = system.step()
    assert {output.request_id for output in outputs} == {"late", "never"}
    assert all(isinstance(output.error, DeadlineExceeded) for output in outputs)
    stats = system.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_kv_blocks) == (0, 0, stats.num_kv_blocks)
    assert not system.engine.has_work
