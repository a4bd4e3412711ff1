"""The autoregressive baseline: batches of one shape say what each prompt alone says."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dparallel.hub_cards import load_measurements
from tests.golden import CHECKPOINT
from tests.scripts import load

baseline = load("gsm8k/evaluate_autoregressive.py")
QUESTIONS = ["Sam has 3 beads.", "Ann has 12 red beads and 5 blue beads. How many beads does Ann have?", "Why?"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=592, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, initializer_range=0.5,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = "".join(json.dumps({"question": each, "answer": "#### 3"}) + "\n" for each in QUESTIONS)
    for name in ("gsm8k_rest", "symbolic_seen", "symbolic_unseen"):
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_a_batch_says_what_each_prompt_alone_says(folder):
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    questions = baseline.GSM8K_REST.questions(data=folder)
    texts, tokens, seconds = baseline.Answers(model, tokenizer, questions, 2, 12).all()
    assert len(texts) == 3 and seconds > 0
    for question, text, count in zip(questions, texts, tokens, strict=True):
        prompt = torch.tensor([baseline.tokenize_prompt(question, tokenizer)])
        alone = model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
        if tokenizer.eos_token_id in alone:
            alone = alone[: alone.index(tokenizer.eos_token_id) + 1]
        assert (text, count) == (tokenizer.decode(alone, skip_special_tokens=True), len(alone))


def test_the_script_writes_a_table(folder, monkeypatch, capsys):
    for task in baseline.TASKS:
        monkeypatch.setitem(task.__dict__, "max_new_tokens", 8)
    words = f"--model {folder / 'model'} --rows {folder} --output_dir {folder / 'out'} --batch_sizes 1 2"
    monkeypatch.setattr("sys.argv", ["evaluate_autoregressive.py", *words.split(), "--speed_problems", "2"])
    baseline.main()
    points = load_measurements(folder / "out" / "results.json")
    sizes = [(point.num_examples, point.decoding["batch_size"]) for point in points]
    assert sizes == [(2, 1), (2, 2), (3, 2), (3, 2), (3, 2)]
    assert {(point.tpf, point.dataset) for point in points[2:]} == {
        (1.0, name) for name in ("gsm8k_rest.jsonl", "symbolic_seen.jsonl", "symbolic_unseen.jsonl")
    }
    assert capsys.readouterr().out.count("\n| ") == 6
    monkeypatch.setattr("sys.argv", ["evaluate_autoregressive.py", *words.split(), "0"])
    with pytest.raises(SystemExit):
        baseline.main()
    assert "--batch_sizes [1, 2, 0]: each must be at least 1" in capsys.readouterr().err
