"""Cards as their readers get them: rendered samples stand in `expected/`."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard

from dparallel.hub_cards import dataset_card, model_card
from dparallel.modeling import UnmaskingFilter, UnmaskingFilterConfig
from tests.families import FAMILIES

EXPECTED = Path(__file__).parent / "expected"
MEASURED = {
    "task": "GSM8K", "dataset": "openai/gsm8k", "split": "test", "num_examples": 1319, "accuracy": 0.7612,
    "nfe": 30.14, "tpf": 4.21, "decoding": {"unmasking": "entropy_threshold", "threshold": 0.5},
    "hardware": "NVIDIA H200", "date": "2026-11-25", "versions": "torch 2.11, transformers 5.17.0",
}  # fmt: skip
SLOW = {
    **MEASURED, "decoding": {"unmasking": "confidence", "steps": 256}, "model": "GSAI-ML/LLaDA-8B-Instruct",
    "accuracy": 0.757, "nfe": 256.0, "tpf": 0.53,
}  # fmt: skip
TRAINING = {
    "trainer": "CertaintyForcingTrainer", "method": "certainty-forcing distillation",
    "paper": {"title": "dParallel: Learnable Parallel Decoding for dLLMs", "id": "2509.26488"},
    "base_model": "GSAI-ML/LLaDA-8B-Instruct", "model_type": "llada", "datasets": ["user/gsm8k-trajectories"],
    "arguments": {"global batch": 64, "learning_rate": "2e-05", "certainty_weight": "2.0"},
    "adapter": {"r": 128, "lora_alpha": 128, "target_modules": "k_proj, q_proj, up_proj, v_proj"},
    "steps": 600, "versions": "dparallel 0.1.0, torch 2.11.0, transformers 5.17.0",
    "hardware": "8 x NVIDIA H200", "date": "2026-11-25",
}  # fmt: skip
ROW = {
    "prompt": "Sam has 3 books.", "question": "Sam has 3 books.", "response": "So it is 3.", "input_ids": [5, 6, 7, 0],
    "prompt_length": 2, "unmasking_step": [0, 1], "num_forward_passes": 2, "correct": True, "example_id": 0, "seed": 0,
    "settings": '{"unmasking": "confidence", "steps": 256, "max_new_tokens": 256}',
}  # fmt: skip


@pytest.fixture
def folder(word_tokenizer, tmp_path):
    """A distilled model with a filter, as training and evaluation leave it."""
    model = FAMILIES["llada"].small()
    model.generation_config.update(unmasking="entropy_threshold", threshold=0.5, max_new_tokens=256, do_sample=False)
    torch.manual_seed(0)
    model.set_unmasking_filter(UnmaskingFilter(UnmaskingFilterConfig()))
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"measurements": [SLOW, MEASURED]}))
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    return tmp_path


def expect(card, name):
    """It is the file. `UPDATE_CARDS=1 pytest tests/hub_cards/test_cards.py` writes the files anew: read the diff."""
    path, text = EXPECTED / name, str(card).rstrip() + "\n"
    if os.environ.get("UPDATE_CARDS"):
        path.write_text(text)
    assert text == path.read_text()


def validate(hub, card, repo_type):
    """The check of every commit. (`card.validate()` asks huggingface.co, in older versions whatever the endpoint.)"""
    HfApi(endpoint=hub.url)._validate_yaml(str(card), repo_type=repo_type)


def test_the_card_of_a_model(hub, folder):
    card = model_card(
        folder, "user/llada-parallel", license="mit", language="en", limitations=["It learned from GSM8K alone."],
        printed="17 * 23 = 391.\n6 forward passes", printed_on="a GPU with PyTorch 2.11.0",
    )  # fmt: skip
    expect(card, "model_card.md")
    validate(hub, card, "model")
    results = ModelCard(str(card)).data.eval_results
    assert {each.metric_type: each.metric_value for each in results} == {"accuracy": 76.12, "nfe": 30.14, "tpf": 4.21}


def test_the_card_of_a_dataset(hub):
    rows = Dataset.from_list([{**ROW, "example_id": i, "correct": i != 1} for i in range(4)])
    card = dataset_card(
        {"train": rows, "test": rows.select([0])}, "user/gsm8k-trajectories", model="GSAI-ML/LLaDA-8B-Instruct",
        sources=["openai/gsm8k"], license="mit", language="en",
    )  # fmt: skip
    expect(card, "dataset_card.md")
    validate(hub, card, "dataset")
    card.data.license = "No Such Licence"
    with pytest.raises(ValueError, match="license"):
        validate(hub, card, "dataset")
    assert DatasetCard(str(card)).data.source_datasets == ["openai/gsm8k"]
    unjudged = dataset_card({"train": rows.map(lambda row: {"correct": None})}, "user/x")
    assert "`CertaintyForcingTrainer(model, train_dataset=rows)`" in str(unjudged), "a filter would leave nothing"
