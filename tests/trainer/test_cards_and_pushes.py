"""What trainers leave beside a model, and what goes to the Hub while they train."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.families import FAMILIES
from tests.hub_cards.conftest import hub  # noqa: F401
from tests.trainer.test_masked_diffusion_trainer import build_trainer


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_saving_leaves_no_card_but_ones_own(tmp_path, word_tokenizer, peft_config):
    """peft would leave a form with a path of this machine."""
    model, card = FAMILIES["llada"].small(), tmp_path / "README.md"
    model.config._name_or_path = "/home/me/model"
    options = {"peft_config": peft_config, "max_steps": 1, "save_strategy": "epoch"}
    trainer = build_trainer(tmp_path, word_tokenizer, model, **options)
    trainer.train()
    trainer.save_model()
    assert not card.exists() and not (tmp_path / "checkpoint-1" / "README.md").exists()
    card.write_text("mine")
    trainer.save_model()
    assert card.read_text() == "mine"
    trainer.create_model_card()
    assert "masked diffusion training" in card.read_text()
    assert not any(words in card.read_text() for words in ("/home/me", "More Information Needed"))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, ["# mine", 'repo = "user/mine"']),
        ({"model_name": "other"}, ["# mine", 'repo = "user/mine"']),
        ({"tasks": "text-generation", "tags": "math"}, ["- math\n", "pipeline_tag: text-generation"]),
        ({"dataset": "a/b", "dataset_tags": ["a/b", "c/d"]}, ["datasets:\n- a/b\n- c/d\n"]),
        ({"tasks": "translation"}, r"`tasks='translation'` is not allowed: these models are for 'text-generation'"),
        ({"dataset_args": "main"}, r"`dataset_args='main'` is not allowed: the card has no place"),
    ],
)
def test_what_a_card_is_told(tmp_path, word_tokenizer, arguments, found):
    trainer = build_trainer(tmp_path, word_tokenizer, FAMILIES["llada"].small(), hub_model_id="user/mine")
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            trainer.create_model_card(**arguments)
    else:
        trainer.create_model_card(**arguments)
        card = (tmp_path / "README.md").read_text()
        assert all(line in card for line in found)


@pytest.mark.parametrize("hub_strategy", ["every_save", "checkpoint"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)])
def test_what_is_pushed_in_training_can_be_loaded(tmp_path, word_tokenizer, hub, hub_strategy, peft_config):  # noqa: F811
    trainer = build_trainer(
        tmp_path / "out", word_tokenizer, FAMILIES["llada"].small(), peft_config=peft_config, push_to_hub=True,
        hub_model_id="user/model", hub_strategy=hub_strategy, max_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    files = hub.repos["models", "user/model"].files()
    assert {"README.md", "training.json", "tokenizer.json"} <= files.keys()
    assert "# model" in files["README.md"].content.decode() and "settings.json" not in files
    assert ("last-checkpoint/settings.json" in files) == (hub_strategy == "checkpoint")
    if peft_config is not None:
        pushed = load(files["adapter_model.safetensors"].content)
        trained = {name: weight for name, weight in trainer.model.named_parameters() if "lora_" in name}
        assert pushed and all(torch.equal(pushed[name.replace(".default", "")], trained[name]) for name in trained)
        return
    (tmp_path / "pulled").mkdir()
    for name, file in files.items():
        if "/" not in name:
            (tmp_path / "pulled" / name).write_bytes(file.content)
    remote = get_class_from_dynamic_module("modeling_llada.LLaDAModelLM", tmp_path / "pulled")  # not the one installed
    model = remote.from_pretrained(tmp_path / "pulled").eval()
    ids = torch.arange(5, 9)[None]
    assert type(model) is not type(trainer.model) and torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
