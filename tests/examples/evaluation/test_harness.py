"""lm-evaluation-harness on a task over a local file: from the shell, against `generate()` itself."""

import json

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from dparallel.evaluation.harness import DiffusionLM
from tests.examples.evaluation.rows import QUESTIONS
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import run


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task that generates, and one that compares likelihoods."""
    rows = [{**row, "answer": row["answer"].split()[-1]} for row in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (tmp_path / "word_problems.yaml").write_text(f"""task: word_problems{head}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<|endoftext|>"], do_sample: false, max_gen_toks: 128}}
filter_list:
  - name: answer
    filter: [{{function: regex, regex_pattern: "The answer is ([0-9]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")
    (tmp_path / "choices.yaml").write_text(f"""task: choices{head}
output_type: multiple_choice
doc_to_choice: ["20", "21"]
doc_to_target: 0
""")
    return tmp_path


def evaluate(model, folder, task="word_problems", **arguments):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=[task], task_manager=manager, apply_chat_template=True, bootstrap_iters=0, **arguments
    )


def test_the_harness_own_model(tasks):
    """`lm_eval --model hf`, unmodified."""
    arguments = {"pretrained": str(CHECKPOINT), "trust_remote_code": True, "dtype": "float32"}
    results = evaluate("hf", tasks, model_args=arguments, batch_size=3, device="cpu")
    assert results["results"]["word_problems"]["exact_match,answer"] == 1.0


def test_policies_and_batches(tasks, word_model, word_tokenizer):
    decoding = {"unmasking": "confidence_threshold", "threshold": 0.9, "block_length": 16}
    results = {}
    for batch_size in (1, 3):
        model = DiffusionLM(word_model, tokenizer=word_tokenizer, batch_size=batch_size, device="cpu", **decoding)
        results[batch_size] = evaluate(model, tasks)
        assert results[batch_size]["results"]["word_problems"]["exact_match,answer"] == 1.0
    passes, tokens = 0, 0
    for row in QUESTIONS:
        chat = [{"role": "user", "content": row["question"]}]
        ids = word_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = word_model.generate(**ids, max_new_tokens=128, return_dict_in_generate=True, **decoding)
        passes, tokens = passes + output.num_forward_passes.item(), tokens + output.num_tokens.item()
    for result in results.values():
        assert result["config"]["nfe"] == {"word_problems": passes / 3}
        assert result["config"]["tpf"] == {"word_problems": tokens / passes}


def test_answers_have_the_checkpoints_length_unless_the_task_says(tasks, word_model, word_tokenizer):
    """Of 128 tokens, which the example model learned; with the harness's 256 it errs."""
    path, lengths = tasks / "word_problems.yaml", []
    text = path.read_text()

    class Watched(DiffusionLM):
        def _model_generate(self, context, max_length, stop, **kwargs):
            lengths.append(max_length - context.shape[1])
            return super()._model_generate(context, max_length, stop, **kwargs)

    decoding = {"unmasking": "confidence", "steps": 4, "stop_at_eos": False}
    for said in ("", ", max_gen_toks: 64"):
        path.write_text(text.replace(", max_gen_toks: 128", said))
        evaluate(Watched(word_model, tokenizer=word_tokenizer, batch_size=3, device="cpu", **decoding), tasks)
    assert lengths == [word_model.generation_config.max_new_tokens, 64] == [128, 64]


def test_wrong_arguments(word_model, word_tokenizer):
    for arguments, message in (
        ({}, r"`pretrained=None` is not allowed: name a model"),
        (
            {"pretrained": str(STUDENT), "unmaskin": "margin"},
            r"`unmaskin='margin'` is not allowed: it must be an argument",
        ),
        ({"pretrained": "/nowhere"}, r"`pretrained='/nowhere'` is not allowed: there is no such folder"),
        ({"pretrained": word_model, "unmasking": "nonsense"}, r"`unmasking='nonsense'` is not allowed"),
        ({"pretrained": word_model, "unmasking": "margin", "threshold": 1}, r"`threshold=1` .* have no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusionLM(tokenizer=word_tokenizer, device="cpu", **arguments)


def test_likelihoods_are_refused(tasks, word_model, word_tokenizer):
    model = DiffusionLM(word_model, tokenizer=word_tokenizer, batch_size=1, device="cpu")
    with pytest.raises(NotImplementedError, match=r"'choices' compares likelihoods, .* choose a task that generates"):
        evaluate(model, tasks, "choices")


@pytest.mark.slow
def test_from_the_shell(tasks, tmp_path):
    flags = ["--model", "dparallel", "--tasks", "word_problems", "--include_path", tasks, "--apply_chat_template"]
    flags += ["--model_args", f"pretrained={STUDENT},dtype=float32,unmasking=entropy_threshold,threshold=0.1"]
    flags += ["--batch_size", 3, "--device", "cpu", "--output_path", tmp_path / "out"]
    result = run("dparallel.evaluation.harness", *flags, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    config = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["config"]
    assert config["decoding"] == {"unmasking": "entropy_threshold", "threshold": 0.1}
    assert "forward passes per answer" in result.stderr + result.stdout
    assert config["nfe"]["word_problems"] < 10 and config["tpf"]["word_problems"] > 5
