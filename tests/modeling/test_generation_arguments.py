"""What `generate()` refuses by name, what it says, and what it takes from callers that know nothing of diffusion."""

import copy
import itertools
import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import BatchEncoding, CompileConfig, GenerationConfig, pipeline
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
)

from dparallel.modeling import POLICIES, DiffusionGenerationConfig
from dparallel.modeling.generation_config_diffusion import (
    HONOURED_FIELDS,
    NEUTRAL_FIELDS,
    OTHER_NAMES,
    OTHER_POLICIES,
)

# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_projects_names_are_answered_with_ours(model, prompt, name):
    with pytest.raises(
        ValueError, match=rf"`{name}` is not (an argument here: it must be |supported: decoding has no)"
    ):
        model.generate(prompt, max_new_tokens=4, **{name: 1})
    accepted = {"max_new_tokens", "unmasking", "unmasking_temperature", "threshold", "steps", "mask_token_id"}
    accepted |= {"block_length", "block_cache", "stop_at_eos", "suppress_tokens", "return_dict_in_generate"}
    accepted |= {"streamer", "logits_processor", "max_batch_size"}
    assert OTHER_NAMES[name] is None or any(word in OTHER_NAMES[name] for word in accepted)


@pytest.mark.parametrize("name", OTHER_POLICIES)
def test_other_projects_policies_are_answered_with_ours(model, prompt, name):
    assert name not in POLICIES and OTHER_POLICIES[name] in POLICIES
    with pytest.raises(ValueError, match=f"`unmasking='{name}'` .* must be '{OTHER_POLICIES[name]}', as that policy"):
        model.generate(prompt, max_new_tokens=4, unmasking=name)


def test_a_policy_is_a_name(model, prompt):
    with pytest.raises(ValueError, match=r"`unmasking=\['confidence'\]` is not allowed: it must be one of "):
        model.generate(prompt, max_new_tokens=4, unmasking=["confidence"])


SET = {
    "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.7,
    "assistant_lookbehind": 3, "target_lookbehind": 3, "max_matching_ngram_size": 2, "prompt_lookup_num_tokens": 3,
    "compile_config": CompileConfig(), "continuous_batching_config": {"a": 1}, "assistant_ensemble_weight": 0.5,
    "num_beams": 2, "penalty_alpha": 0.6, "guidance_scale": 1.5, "watermarking_config": {"bias": 2.0},
    "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2, "min_length": 3, "length_penalty": 0.5,
    "cache_implementation": "static", "output_scores": True, "output_hidden_states": True, "token_healing": True,
    "prefill_chunk_size": 8, "dola_layers": "high", "forced_bos_token_id": 3, "early_stopping": True,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SET.keys() & GenerationConfig().to_dict().keys()))
@pytest.mark.parametrize("place", ["argument", "configuration", "checkpoint"])
def test_standard_fields_without_effect_are_refused(model, prompt, monkeypatch, name, place):
    arguments = {"max_new_tokens": 4}
    if place == "argument":
        arguments[name] = SET[name]
    elif place == "configuration":
        arguments["generation_config"] = GenerationConfig(max_new_tokens=4)
        setattr(arguments["generation_config"], name, SET[name])
    else:
        monkeypatch.setattr(model.generation_config, name, SET[name])
    with pytest.raises(
        ValueError, match=rf"`{name}=.* is for autoregressive decoding, or not supported .*: it must be left out"
    ):
        model.generate(prompt, **arguments)


def test_every_standard_field_is_honoured_or_refused():
    fields = set(GenerationConfig().to_dict())
    refused = fields - {*HONOURED_FIELDS, *NEUTRAL_FIELDS}
    assert set(SET) & fields <= refused and len(refused) > 30
    assert set(HONOURED_FIELDS) <= fields, "none of ours, and none that is misspelt"


def test_a_batch_encoding_is_to_be_unpacked(model, prompt):
    for batch in (BatchEncoding({"input_ids": prompt}), {"input_ids": prompt}):
        for arguments in ((batch,), ()):
            with pytest.raises(ValueError, match=r"it must be unpacked, `generate\(\*\*inputs\)`"):
                model.generate(*arguments, **({} if arguments else {"input_ids": batch}))


def test_without_a_prompt_the_answer_follows_bos(model, monkeypatch):
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    with pytest.raises(ValueError, match=r"Exactly one of `inputs` and `input_ids` must be given, .*; or neither, if"):
        model.generate(max_new_tokens=4)
    expected = model.generate(torch.tensor([[7]]), max_new_tokens=4)
    assert torch.equal(model.generate(max_new_tokens=4, bos_token_id=7), expected)


def test_a_pipeline_takes_an_empty_text(reader, word_tokenizer):
    answer = pipeline("text-generation", reader, tokenizer=word_tokenizer)
    found = answer("", max_new_tokens=8, bos_token_id=word_tokenizer.bos_token_id)
    assert isinstance(found[0]["generated_text"], str)


# --- processors ------------------------------------------------------------------------------------------------------


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Stricter(NoRepeatNGramLogitsProcessor):
    pass


IDS = torch.zeros(1, 3, dtype=torch.long)
NEEDS_DECIDED = {
    "prefix": lambda: PrefixConstrainedLogitsProcessor(lambda _, ids: [3], 1),
    "ngrams": lambda: NoRepeatNGramLogitsProcessor(2),
    "derived": lambda: Stricter(2),
    "encoder ngrams": lambda: EncoderNoRepeatNGramLogitsProcessor(2, IDS),
    "forced": lambda: ForcedBOSTokenLogitsProcessor(3),
    "words": lambda: SequenceBiasLogitsProcessor([[[3, 4], -5.0]]),
    "bad words": lambda: NoBadWordsLogitsProcessor([[3, 4]], eos_token_id=5),
}
RIGHT_ANYWHERE = {
    "own": Own,
    "top-k": lambda: TopKLogitsWarper(5),
    "repetition": lambda: RepetitionPenaltyLogitsProcessor(1.1),
    "length": lambda: MinNewTokensLengthLogitsProcessor(9, 3, torch.tensor(5)),
    "one word": lambda: SequenceBiasLogitsProcessor([[[3], -5.0]]),
    "one bad word": lambda: NoBadWordsLogitsProcessor([[3]], eos_token_id=5),
}


@pytest.mark.parametrize("kind", NEEDS_DECIDED)
def test_processors_that_need_decided_tokens_are_refused(model, prompt, kind):
    with pytest.raises(
        ValueError, match=r"`logits_processor` holds a \w+, which needs .* `block_length=4`, that is not"
    ):
        model.generate(prompt, max_new_tokens=4, block_length=4, logits_processor=[Own(), NEEDS_DECIDED[kind]()])


@pytest.mark.parametrize("kind", RIGHT_ANYWHERE)
def test_other_processors_are_taken(model, prompt, kind):
    assert model.generate(prompt, max_new_tokens=4, block_length=4, logits_processor=[RIGHT_ANYWHERE[kind]()]).any()


def test_in_blocks_of_one_token_a_constraint_holds(model, prompt):
    allowed = [[5, 6, 7], [8, 9, 10, 11]]

    def continuations(_, ids):
        done = ids[9:].tolist()
        return [each[len(done)] for each in allowed if each[: len(done)] == done and len(each) > len(done)] or [318]

    constraint = PrefixConstrainedLogitsProcessor(continuations, 1)
    answer = model.generate(prompt, max_new_tokens=6, block_length=1, logits_processor=[constraint])[0, 9:].tolist()
    assert answer in [[5, 6, 7, 318, 318, 318], [8, 9, 10, 11, 318, 318]]
    answer = model.generate(
        prompt, max_new_tokens=12, block_length=1, stop_at_eos=False,
        logits_processor=[NoRepeatNGramLogitsProcessor(2)],
    )[0].tolist()  # fmt: skip
    pairs = list(itertools.pairwise(answer))
    assert len(set(pairs)) == len(pairs)


# --- devices and numbers ---------------------------------------------------------------------------------------------


def test_other_accelerators(model, prompt, monkeypatch):
    expected = model.generate(prompt, max_new_tokens=4)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)  # as of a tensor on mps:0
    assert torch.equal(model.generate(prompt, max_new_tokens=4), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"unmasking": "entropy_bound"}, {"unmasking": "margin"}]
)
def test_logits_that_are_no_numbers_are_told(family, prompt, caplog, settings):
    model = family.load()
    batch, settings = torch.cat((prompt, prompt)), {"max_new_tokens": 8, **settings}
    with caplog.at_level(logging.WARNING, "transformers"):
        model.generate(batch, attention_mask=torch.ones_like(batch), **settings)
        assert "NaN" not in caplog.text
        with torch.no_grad():
            model.get_submodule(family.norm).weight[0] = float("nan")
        model.generate(batch, attention_mask=torch.ones_like(batch), **settings)
    told = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert len(told) == 1 and "rows [0, 1]" in told[0] and "float16" in told[0]


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_a_learned_prompt_is_refused(family, config):
    shape = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 4, "num_transformer_submodules": 1}
    extra = {"encoder_hidden_size": 32} if config is PromptEncoderConfig else {}
    adapted = get_peft_model(family.make(), config(task_type="CAUSAL_LM", num_virtual_tokens=3, **shape, **extra))
    kind = adapted.active_peft_config.peft_type.value
    with pytest.raises(
        ValueError, match=f"The adapter is of the kind {kind}, which `generate\\(\\)` does not support"
    ):
        adapted.eval().generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_alora_is_refused(family):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[2, 3])
    adapted = get_peft_model(family.make(), config).eval()
    with pytest.raises(ValueError, match="The adapter is of the kind aLoRA"):
        adapted.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4)


def test_each_row_keeps_its_adapter_when_others_end(family):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(family.make(), config, adapter_name="one").eval()
    adapted.add_adapter("two", config)
    ids = torch.randint(0, 47, (4, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 24, "block_length": 4, "pad_token_id": 48}
    names = ["one", "two", "one", "two"]
    free = adapted.generate(input_ids=ids, adapter_names=names, stop_at_eos=False, **settings)
    settings["eos_token_id"] = sorted({int(free[0, 7]), int(free[1, 8])})  # two rows end in the first block
    found = adapted.generate(input_ids=ids, adapter_names=names, **settings)
    for row, name in enumerate(names):
        alone = adapted.generate(input_ids=ids[row : row + 1], adapter_names=[name], **settings)
        assert torch.equal(found[row], alone[0])


# --- shapes that a compiler may leave open ---------------------------------------------------------------------------


def test_exported_for_any_length(family):
    model, ids = family.make().eval(), torch.randint(0, 47, (2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = {"input_ids": {1: torch.export.Dim.AUTO}}
        program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes, strict=False)
    for length in (5, 64, 65, 200):
        ids = torch.randint(0, 47, (2, length))
        torch.testing.assert_close(program.module()(input_ids=ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_number_without_its_policy_is_asked_about(model, caplog):
    """Where the model was saved with another policy than the default, which a number alone does not say."""
    model = copy.deepcopy(model)
    model.generation_config.update(unmasking="entropy_bound", threshold=0.1)
    prompt, number = torch.tensor([[5, 6, 7]]), len(type(model).__name__) / 64  # what was said once is not said again
    with caplog.at_level("WARNING"):
        model.generate(prompt, max_new_tokens=8, threshold=0.2, unmasking="entropy_bound")
        assert "name the one you mean" not in caplog.text
        model.generate(prompt, max_new_tokens=8, threshold=number)
    assert f"`threshold={number}` is taken as one of `unmasking='entropy_bound'`" in caplog.text


@pytest.mark.parametrize(("name", "message"), [("gen_length", "it must be `max_new_tokens`"), ("unmask", "a typo")])
def test_names_in_a_configuration_are_looked_at_too(model, name, message):
    config = DiffusionGenerationConfig(**{name: 16})
    with pytest.raises(ValueError, match=f"`{name}` is not an argument.*{message}"):
        model.generate(torch.tensor([[5, 6, 7]]), generation_config=config)


def test_a_length_that_is_text_is_refused(model):
    with pytest.raises(ValueError, match="`max_new_tokens='64'` is not allowed: it must be an integer"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens="64")
