"""Models that transformers loads in another way: with quantised weights, or spread over devices."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dparallel.modeling.captured_step import captured_steps
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer
from tests.golden import CHECKPOINT

SETTINGS = {"max_new_tokens": 96, "unmasking": "entropy_threshold", "threshold": 0.1}
QUESTIONS = ["Tom has 12 apples . He buys 5 more . How many apples does he have ?"] * 2


def prompts(tokenizer, device):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_decode_and_train(bits, word_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, quantization_config=config, dtype=torch.bfloat16, device_map={"": 0}
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).to("cuda").eval()
    assert model.get_memory_footprint() < plain.get_memory_footprint()
    inputs = prompts(word_tokenizer, "cuda")
    assert captured_steps(model) is None and captured_steps(plain) is not None
    for cache in ("none", "dual"):
        answer = model.generate(**inputs, block_cache=cache, **SETTINGS)
        expected = plain.generate(**inputs, block_cache=cache, **SETTINGS)
        # Rounded weights may choose another wording, but the first line is still arithmetic.
        assert (answer == expected).float().mean() > 0.5
        assert torch.equal(answer[0], answer[1])

    rows = [
        {"prompt": [{"role": "user", "content": QUESTIONS[0]}], "completion": [{"role": "assistant", "content": "17"}]}
    ]
    trainer = CertaintyForcingTrainer(
        model,
        CertaintyForcingConfig(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, bf16=True,
            max_length=64, save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows * 32),
        processing_class=word_tokenizer,
        peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.gpu
def test_models_on_cpu_and_gpu_decode_as_on_one(family):
    alone = family.load().to("cuda")
    blocks = alone.get_submodule(family.blocks)
    device_map = {family.embedding: 0, family.norm: 0, family.head: 0}
    device_map |= {f"{family.blocks}.{i}": 0 if i == 1 else "cpu" for i in range(len(blocks))}
    device_map |= {"model.rotary_emb": 0} if family.name == "dream" else {}
    spread = family.load(device_map=device_map)
    assert captured_steps(spread) is None
    ids = torch.randint(0, 317, (2, 9), generator=torch.Generator().manual_seed(0)).to("cuda")
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9], device="cuda")
    for cache in ("none", "prefix", "dual"):
        settings = {"attention_mask": mask, "max_new_tokens": 24, "block_length": 8, "block_cache": cache}
        assert torch.equal(spread.generate(ids, **settings), alone.generate(ids, disable_compile=True, **settings))


def test_models_with_weights_on_disk_decode_as_in_memory(family, model, tmp_path):
    """The same mechanism where there is no GPU."""
    names = [name for name, _ in model.named_children()]
    blocks = model.get_submodule(family.blocks)
    device_map = {name: "cpu" for name in names if name != "model"}
    device_map |= {family.embedding: "cpu", family.norm: "cpu", family.head: "cpu"}
    device_map |= {f"{family.blocks}.{i}": "cpu" if i == 1 else "disk" for i in range(len(blocks))}
    device_map |= {"model.rotary_emb": "cpu"} if family.name == "dream" else {}
    spread = family.load(device_map=device_map, offload_folder=tmp_path)
    ids = torch.randint(0, 317, (2, 9), generator=torch.Generator().manual_seed(0))
    for cache in ("none", "dual"):
        settings = {"max_new_tokens": 16, "block_length": 8, "block_cache": cache}
        assert torch.equal(spread.generate(ids, **settings), model.generate(ids, **settings))
