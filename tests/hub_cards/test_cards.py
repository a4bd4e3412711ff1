"""Cards as their readers get them: rendered samples stand in `expected/`."""

import json
import os
import re
from email import message_from_string
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import DatasetCard, HfApi, ModelCard

from dparallel.hub_cards import dataset_card, model_card, requirements
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
    "num_examples": 7473, "steps": 600, "versions": "dparallel 0.1.0, torch 2.11.0, transformers 5.17.0",
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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *(("license", value, value) for value in ("Apache 2.0", "MIT", "apache2", "BSD-3-Clause", "", "CC BY 4.0")),
        *(("language", value, value) for value in ("English", "en-US", "zh_CN", "EN", "xx", "en, de", "e", "german")),
        ("language", ["en", "french"], "french"),
        *(
            ("ids", value, value)
            for value in (
                "/home/me/rows.jsonl", "./rows", "rows.jsonl", "data/rows.jsonl", "gsm8k", "openai/gsm8k/main",
                "https://huggingface.co/datasets/openai/gsm8k", "my data/rows", "user/-rows", "../rows", "user/a..b",
            )
        ),
        ("ids", ["openai/gsm8k", "data/rows.parquet"], "data/rows.parquet"),
    ],
)  # fmt: skip
def test_metadata_that_the_hub_does_not_take(folder, tmp_path, name, value, said):
    """It is refused for models and for datasets, and named."""
    rows = Dataset.from_list([ROW])
    calls = [
        (lambda **card: model_card(folder, "user/x", **card), ("datasets", "base_model")),
        (lambda **card: dataset_card({"train": rows}, "user/x", **card), ("sources", "model")),
    ]
    for call, ids in calls:
        for argument in ids if name == "ids" else [name]:
            with pytest.raises(ValueError) as error:
                call(**{argument: value})
            assert str(error.value).startswith(f"`{argument}={value!r}` is not allowed: ") and said in str(error.value)


@pytest.mark.parametrize(
    "card",
    [
        {"license": "openrail++"}, {"license": "other"}, {"language": "multilingual"}, {"language": "code"},
        {"language": ["en", "deu", "yue"]}, {"datasets": "openai/gsm8k"}, {"datasets": ["a/b", "c.d/e_f-g"]},
        {"base_model": "GSAI-ML/LLaDA-8B-Instruct"},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_the_hub_takes(hub, folder, card):
    written = model_card(folder, "user/x", **card)
    validate(hub, written, "model")
    (name, value), *_ = card.items()
    stated = getattr(written.data, name)
    assert stated == ([value] if name == "datasets" and isinstance(value, str) else value)


def test_a_card_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(
        requirements, "_metadata", lambda: message("Requires-Dist: torch>=3\nRequires-Dist: transformers<9,>=8.1\n")
    )
    text = str(model_card(folder, "user/x"))
    assert 'With Python 3.14 or later:\n\n```bash\npip install "torch>=3" "transformers>=8.1,<9"\n```' in text


@pytest.mark.parametrize("has_address", [False, True])
def test_the_card_of_an_adapter_says_where_the_package_is(tmp_path, monkeypatch, has_address):
    """And how it decodes: an adapter has no `generation_config.json`."""
    url = "Project-URL: Repository, https://example.org/dparallel\n" * has_address
    more = "Requires-Dist: peft>=7; extra == 'train'\nRequires-Dist: accelerate>=6; extra == 'train'\n"
    monkeypatch.setattr(requirements, "_metadata", lambda: message(url + more))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "user/base"}')
    decoding = {"unmasking": "entropy_bound", "threshold": 0.2, "block_length": 16}
    (tmp_path / "training.json").write_text(json.dumps({**TRAINING, "decoding": decoding}))
    text = str(model_card(tmp_path, "user/x", license="mit"))
    assert 'unmasking="entropy_bound", threshold=0.2, block_length=16' in text
    line = '"dparallel @ git+https://example.org/dparallel"' if has_address else "."
    assert f'pip install {line} "peft>=7" "accelerate>=6"' in text
    assert ("in a copy of the sources of dparallel 5.6" in text) != has_address


def message(more):
    return message_from_string(f"Name: dparallel\nVersion: 5.6\nRequires-Python: >=3.14\n{more}")


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"unmasking": "learned_filter", "threshold": 0.9}, "selects it: a token is written once .* above 0.9"),
        ({"unmasking": "learned_filter"}, "selects it: a token is written once .* above 0.96"),
        (
            {"unmasking": "entropy_threshold", "threshold": 0.5},
            r"does not select it.*learned_filter\", threshold=0.96",
        ),
    ],
)
def test_a_filter_is_explained(folder, generation, words):
    (folder / "generation_config.json").write_text(json.dumps(generation))
    text = " ".join(str(model_card(folder, "user/x")).split())
    assert "a network of 2,112 parameters that reads a block (confidence)" in text
    assert re.search(f"`generation_config.json` {words}", text)


@pytest.mark.parametrize("one", ["It learned from GSM8K alone.", ["It learned from GSM8K alone."]])
def test_one_sentence_is_one_limitation(folder, one):
    assert "\n- It learned from GSM8K alone.\n" in str(model_card(folder, "user/x", limitations=one))
