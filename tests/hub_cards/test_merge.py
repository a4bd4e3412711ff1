"""Merging: the plain checkpoint is the adapted model, with everything that it needs."""

import itertools
import re
import subprocess
import sys

import gguf
import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from dparallel.hub_cards import load_adapted, merge_adapter, push_model
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer
from tests.families import MOSTLY_SLOW

ROWS = [{"prompt": f"Sam has {i} books. ", "completion": f"So it is {i}."} for i in range(8)]


@pytest.fixture
def base(small_model, word_tokenizer, tmp_path):
    """The folder of a base model."""
    model = small_model()
    model.generation_config.max_new_tokens = 128
    model.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trained(family, base, tmp_path, word_tokenizer):
    """An adapter after a few large steps, as a user saves it."""
    model = family.model.from_pretrained(base)
    args = CertaintyForcingConfig(
        str(tmp_path / "adapter"), max_steps=10, learning_rate=3e-2, max_length=32, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, block_length=8,
    )  # fmt: skip
    trainer = CertaintyForcingTrainer(
        model, args, train_dataset=Dataset.from_list(ROWS), processing_class=word_tokenizer,
        peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer.model


@pytest.mark.parametrize("from_disk", [False, True])
def test_merged_equals_unmerged(trained, tmp_path, small_model, word_tokenizer, from_disk):
    ids = torch.arange(300, 330)[None]
    with torch.no_grad():
        expected = trained.eval()(ids).logits
        assert (expected - small_model()(ids).logits).abs().max() > 0.1
        adapter = tmp_path / "adapter" if from_disk else trained
        settings = {"unmasking": "entropy_threshold", "threshold": 0.25}
        merge_adapter(
            adapter, tmp_path / "merged", None if from_disk else word_tokenizer,
            model_init_kwargs={"dtype": "float32"}, **settings,
        )  # fmt: skip
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert not [name for name in merged.state_dict() if "lora" in name]
    config = merged.generation_config
    assert (config.unmasking, config.threshold, config.max_new_tokens) == ("entropy_threshold", 0.25, 128)


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_merged_model_needs_no_package(trained, tmp_path, word_tokenizer):
    merged = merge_adapter(trained, tmp_path / "merged", word_tokenizer, unmasking="entropy_bound", threshold=0.2)
    prompt = "Sam has 3 books. "
    ids = torch.tensor([word_tokenizer(prompt)["input_ids"]])
    expected = merged.eval().generate(ids, unmasking="entropy_bound", threshold=0.2)[0].tolist()
    code = f"""
import sys
sys.modules["dparallel"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
inputs = tokenizer({prompt!r}, return_tensors="pt")
print(model.generate(inputs["input_ids"])[0].tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.strip().splitlines()[-1] == str(expected)


def test_the_threshold_belongs_to_the_policy(trained, tmp_path, word_tokenizer):
    trained.generation_config.unmasking, trained.generation_config.threshold = "confidence_threshold", 0.9
    merged = merge_adapter(trained, tmp_path / "merged", word_tokenizer, unmasking="entropy_threshold")
    assert merged.generation_config.threshold is None


def test_what_cannot_be_merged(tmp_path, family, small_model, word_tokenizer):
    with pytest.raises(ValueError, match=f"`adapter` is a {family.model.__name__} without an adapter"):
        merge_adapter(small_model(), tmp_path)
    with pytest.raises(ValueError, match="`adapter` is a dict: it must be a PeftModel, a folder or a Hub id"):
        merge_adapter({}, tmp_path)
    with pytest.raises(ValueError, match="`adapter='nowhere'` is not allowed: there is no such folder"):
        merge_adapter("nowhere", tmp_path)
    with pytest.raises(ValueError, match=r"`adapter=.*` is not allowed: the folder holds no adapter_config.json"):
        merge_adapter(tmp_path, tmp_path / "merged")
    adapted = get_peft_model(small_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="`threshold=-1` is not allowed"):
        merge_adapter(adapted, tmp_path, word_tokenizer, unmasking="entropy_threshold", threshold=-1)
    with pytest.raises(ValueError, match=r"\['treshold'\] are no fields of DiffusionGenerationConfig"):
        merge_adapter(adapted, tmp_path, word_tokenizer, treshold=0.5)
    query = f"{family.blocks}.0.{family.projections[0]}"
    assert adapted.base_model.model.get_submodule(query).lora_A  # still there
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llada"], indirect=True)
def test_a_folder_does_not_hold_an_adapter_and_its_merged_model(trained, tmp_path, word_tokenizer):
    """`from_pretrained` would apply the adapter to it a second time."""
    for adapter in (trained, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=r"`output_dir=.*adapter'` is not allowed: it holds an adapter"):
            merge_adapter(adapter, tmp_path / "adapter", word_tokenizer)
    assert not (tmp_path / "adapter" / "config.json").exists()


@pytest.mark.parametrize("family", ["llada"], indirect=True)
@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e-5), ("bfloat16", 1e-5), ("bfloat16", 1.0)])
def test_what_rounding_loses_is_said(small_model, tmp_path, word_tokenizer, caplog, dtype, scale):
    """Against the same sum by hand, of all weights before and after."""
    model = small_model().to(getattr(torch, dtype))
    before = {name: weight.double() for name, weight in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), autocast_adapter_dtype=True)
    torch.manual_seed(0)
    changes = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data.normal_(std=scale)
            changes[f"{name}.weight"] = module.get_delta_weight("default").detach().double()
    hf_logging.enable_propagation()
    with caplog.at_level("WARNING"):
        merged = merge_adapter(adapted, tmp_path / "merged", word_tokenizer).state_dict()
    hf_logging.disable_propagation()
    lost = sum((merged[name].double() - before[name] - change).square().sum() for name, change in changes.items())
    share = (lost / sum(change.square().sum() for change in changes.values())).sqrt().item()
    said = re.search(r"Rounding loses (\d+)% of what the adapter changes", caplog.text)
    assert (said is not None) == (share > 0.25) == (dtype == "bfloat16" and scale < 1)
    assert said is None or abs(int(said[1]) - 100 * share) <= 1


SHAPE = {
    "task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4,
    "num_transformer_submodules": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PromptTuningConfig(**SHAPE), "PROMPT_TUNING, which has no weights to merge"),
        (PromptEncoderConfig(**SHAPE, encoder_hidden_size=8), "P_TUNING, which has no weights to merge"),
        (PrefixTuningConfig(**SHAPE), "PREFIX_TUNING, which has no weights to merge"),
        (LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]), "activated LoRA"),
    ],
    ids=["prompt tuning", "P-tuning", "prefix tuning", "aLoRA"],
)
def test_adapters_that_are_no_weights(base, tmp_path, family, word_tokenizer, config, message):
    adapted = get_peft_model(family.model.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    for adapter in (adapted, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=message):
            merge_adapter(adapter, tmp_path / "merged", word_tokenizer)
        with pytest.raises(ValueError, match=message):
            push_model(adapter, "user/x", tokenizer=word_tokenizer, dry_run=tmp_path / "dry")
    assert not (tmp_path / "merged").exists() and not any((tmp_path / "dry").iterdir())


# What peft can do to embedding and head, where "e" and "h" stand for their names.
ON_TOKENS = {
    "LoRA on the embedding": {"target_modules": ["q_proj", "e"]},
    "on the head": {"target_modules": ["q_proj", "h"]},
    "on both": {"target_modules": ["q_proj", "e", "h"]},
    "on both, tied": {"target_modules": ["q_proj", "e", "h"], "ensure_weight_tying": True},
    "DoRA on both": {"target_modules": ["q_proj", "e", "h"], "use_dora": True},
    "embedding in full": {"modules_to_save": ["e"]},
    "head in full": {"modules_to_save": ["h"]},
    "both in full": {"modules_to_save": ["e", "h"]},
    "both in full, tied": {"modules_to_save": ["e", "h"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 6]},
    "tokens of both": {"trainable_token_indices": {"e": [5, 6], "h": [7]}},
    "tokens alone": TrainableTokensConfig(token_indices=[5, 6], target_modules=["e"]),
    "none of them": {},
}
RESIZED = ("LoRA on the embedding", "tokens of both", "none of them")  # tried with more and fewer tokens, too


def on_tokens(family, settings):
    """A `PeftConfig` with the names of a family."""
    if not isinstance(settings, dict):
        settings.target_modules = [family.embedding]
        return settings
    names = {"e": family.embedding, "h": family.head}
    own = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = {names[name]: tokens for name, tokens in value.items()}
        elif isinstance(value, list):
            value = [names.get(each, each) for each in value]
        own[key] = value
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **own})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("name", "change"),
    [*((name, 0) for name in ON_TOKENS), *itertools.product(RESIZED, (8, -8))],
    ids=lambda value: value if isinstance(value, str) else f"{value:+}",
)
def test_embedding_and_head(family, tmp_path, word_tokenizer, name, change, is_tied):
    """Merged in memory or from disk, after tokens were added or cut off: the adapter's own logits, and what
    `config.json` says of the weights is true. Where an adapter did not take the rows of new tokens along, that is
    said."""
    family.small(tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    if change:
        model.resize_token_embeddings(592 + change, mean_resizing=False)
    adapted = get_peft_model(model, on_tokens(family, ON_TOKENS[name])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8, *range(574 + change, 590 + change)]])
    with torch.no_grad():
        expected = adapted(ids).logits
        merge_adapter(adapted, tmp_path / "in memory", word_tokenizer)
        folders = [tmp_path / "in memory"]
        try:
            unmerged = load_adapted(tmp_path / "adapter").eval()
        except ValueError as error:
            assert change > 0 and not is_tied and "the adapter does not hold the others' rows" in str(error)
        else:
            torch.testing.assert_close(unmerged(ids).logits, expected, atol=1e-4, rtol=1e-4)
            merge_adapter(tmp_path / "adapter", tmp_path / "from disk", word_tokenizer)
            folders.append(tmp_path / "from disk")
        for folder in folders:
            merged = AutoModelForCausalLM.from_pretrained(folder).eval()
            torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
            embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
            assert merged.config.tie_word_embeddings == (embedding is head) == torch.equal(embedding, head)
            with safe_open(folder / "model.safetensors", "pt") as file:
                names = set(file.keys())
            assert (f"{family.head}.weight" in names) == (not merged.config.tie_word_embeddings)


def test_new_tokens_of_which_only_the_tokenizer_knows(base, family, tmp_path, word_tokenizer):
    adapted = get_peft_model(family.model.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<{number}>" for number in range(8)])
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="595 tokens, and its base model has 592"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("named", "given", "message"),
    [
        ("", None, "does not say which base model it was trained on: pass `base_model=`"),
        ("/gone/base", None, "The base model '/gone/base' is missing.*in which `adapter=.*Pass `base_model=`"),
        ("runs/base", None, "The base model 'runs/base', which `adapter=.*could not be loaded: pass `base_model=`"),
        ("user/../base", None, "The base model 'user/../base' is missing"),
        ("", "./gone", "The base model './gone' is missing: there is no such folder, and"),
        ("", "user/gone", "The base model 'user/gone' could not be loaded: pass `base_model=`"),
    ],
)
@pytest.mark.parametrize("family", ["llada"], indirect=True)
def test_a_missing_base_model_is_named(base, family, tmp_path, named, given, message):
    adapted = get_peft_model(family.model.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = named
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_model=given)
    with pytest.raises(ValueError, match=message):
        push_model(tmp_path / "adapter", "user/x", base_model=given, dry_run=tmp_path / "dry")
    with pytest.raises(ValueError, match=message):
        load_adapted(tmp_path / "adapter", given)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_model=str(base))


def test_a_serving_engine_knows_the_names(family, trained, tmp_path, word_tokenizer):
    """llama.cpp's own table has a place for every weight of a merged checkpoint; SDAR's are Qwen3's."""
    merge_adapter(trained, tmp_path / "merged", word_tokenizer)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH["QWEN3" if family.name == "sdar" else family.name.upper()], 2)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    places = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
    assert None not in places and len(set(places)) == len(names) > 20
