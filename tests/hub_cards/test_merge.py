"""Merging: the plain checkpoint is the adapted model, with everything that it needs."""

import subprocess
import sys

import gguf
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dparallel.hub_cards import merge_adapter
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer

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
    adapted = get_peft_model(small_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="`threshold=-1` is not allowed"):
        merge_adapter(adapted, tmp_path, word_tokenizer, unmasking="entropy_threshold", threshold=-1)
    with pytest.raises(ValueError, match=r"\['treshold'\] are no fields of DiffusionGenerationConfig"):
        merge_adapter(adapted, tmp_path, word_tokenizer, treshold=0.5)
    query = f"{family.blocks}.0.{family.projections[0]}"
    assert adapted.base_model.model.get_submodule(query).lora_A  # still there
    with pytest.raises(ValueError, match="PROMPT_TUNING, which has no weights to merge"):
        prompts = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4,
            num_transformer_submodules=1,
        )  # fmt: skip
        merge_adapter(get_peft_model(small_model(), prompts), tmp_path, word_tokenizer)


def test_a_serving_engine_knows_the_names(family, trained, tmp_path, word_tokenizer):
    """llama.cpp's own table has a place for every weight of a merged checkpoint."""
    merge_adapter(trained, tmp_path / "merged", word_tokenizer)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.name.upper()], 2)
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    places = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
    assert None not in places and len(set(places)) == len(names) > 20
