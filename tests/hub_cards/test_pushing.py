"""Pushing, with the real client, to a Hub of our own; and loading where this package is not installed."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from dparallel.hub_cards import merge_adapter, push_dataset, push_model
from dparallel.hub_cards.pushing import flaw_of
from dparallel.modeling import UnmaskingFilter, UnmaskingFilterConfig
from dparallel.trainer import CertaintyForcingConfig, CertaintyForcingTrainer, generate_trajectories
from dparallel.trainer.training_record import _model_name
from tests.families import MOSTLY_SLOW
from tests.golden import CHECKPOINT
from tests.scripts import call

ROWS = [{"prompt": f"Sam has {i} books. ", "completion": f"So it is {i}."} for i in range(8)]
MEASUREMENT = {
    "task": "Word problems", "dataset": "word-problems", "split": "test", "num_examples": 100,
    "decoding": {"unmasking": "entropy_threshold", "threshold": 0.1}, "accuracy": 0.9, "nfe": 8.0, "tpf": 6.5,
    "hardware": "CPU", "date": "2026-11-25", "versions": "torch 2.13",
}  # fmt: skip


@pytest.fixture
def model(small_model):
    model = small_model()
    model.generation_config.update(max_new_tokens=32, do_sample=False, unmasking="entropy_threshold", threshold=0.3)
    return model


@pytest.fixture
def folder(model, word_tokenizer, tmp_path):
    """A model's folder, with results."""
    model.save_pretrained(tmp_path / "made")
    word_tokenizer.save_pretrained(tmp_path / "made")
    (tmp_path / "made" / "results.json").write_text(json.dumps({"measurements": [MEASUREMENT]}))
    return tmp_path / "made"


@pytest.fixture
def quick(monkeypatch):
    """Waits take no time."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def push(source, **settings):
    return push_model(source, "user/model", **{"run_snippet": False, **settings})


def repo(hub, kind="models", name="user/model"):
    return hub.repos[kind, name]


def run(hub, code, *arguments):
    """A process without this package."""
    code = f'import sys\nsys.modules["dparallel"] = None\n{code}'
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=hub.environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_the_whole_way(hub, family, small_model, word_tokenizer, tmp_path):
    """A teacher, its trajectories, a student distilled from what was loaded back, merged, with a filter; and all of it
    loaded where this package is not."""
    teacher = small_model()
    teacher.generation_config.update(max_new_tokens=32, do_sample=False)
    push_model(teacher, "user/teacher", tokenizer=word_tokenizer, run_snippet=False)
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    made = generate_trajectories(
        teacher, word_tokenizer, prompts, tmp_path / "shards", lambda row: row["example_id"] > 2, max_new_tokens=32
    )
    push_dataset(made, "user/trajectories", model="user/teacher", sources=["openai/gsm8k"])
    code = (
        'from datasets import load_dataset\nload_dataset("user/trajectories", split="train").save_to_disk(sys.argv[1])'
    )
    run(hub, code, str(tmp_path / "loaded"))
    loaded = Dataset.load_from_disk(tmp_path / "loaded")
    assert loaded.features == made.features and loaded.to_list() == made.to_list()

    args = CertaintyForcingConfig(
        str(tmp_path / "adapter"), max_steps=4, learning_rate=3e-2, max_length=64, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, block_length=8, hub_model_id="user/adapter",
    )  # fmt: skip
    trainer = CertaintyForcingTrainer(
        teacher, args, train_dataset=loaded, processing_class=word_tokenizer, peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(dataset="user/trajectories")
    files = repo(hub, name="user/adapter").files()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"} <= set(files)
    assert not [name for name in files if name.endswith(".bin")]
    card = files["README.md"].content.decode()
    assert (
        "certainty-forcing distillation" in card and "`learning_rate`: 0.03" in card and "library_name: peft" in card
    )
    assert "- certainty-forcing" in card and "- user/trajectories" in card

    student = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", word_tokenizer, base_model=save(small_model(), tmp_path / "base"),
        model_init_kwargs={"dtype": "float32"}, unmasking="learned_filter", threshold=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    student.set_unmasking_filter(UnmaskingFilter(UnmaskingFilterConfig()))
    student.save_pretrained(tmp_path / "merged")
    student.generation_config.max_new_tokens = 32
    student.save_pretrained(tmp_path / "merged")
    push_model(tmp_path / "merged", "user/student")
    files = repo(hub, name="user/student").files()
    assert "certainty-forcing distillation" in files["README.md"].content.decode()
    assert {"unmasking_filter/model.safetensors", "training.json", "model.safetensors"} <= set(files)
    code = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("user/student", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("user/student", trust_remote_code=True)
print(model.generate(**tokenizer("Sam has 3 books. ", return_tensors="pt")).tolist())
"""
    expected = student.eval().generate(**word_tokenizer("Sam has 3 books. ", return_tensors="pt"))
    assert run(hub, code).strip() == str(expected.tolist())


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_the_snippet_of_the_card_runs_as_it_stands(hub, folder, caplog):
    push(folder, run_snippet=True, prompt='Sam has 3 "books".')
    words = "repeats itself|has no text|has no end within|is empty"  # random weights say nothing
    assert re.search(f"The answer to the card's sample prompt ({words})", caplog.text)
    card = repo(hub).files()["README.md"].content.decode()
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)\n```", card, re.DOTALL).groups()
    assert run(hub, code).strip() == printed.strip() and printed.endswith("forward passes")


def test_pushing_again_without_a_change_makes_no_commit(hub, folder):
    first = push(folder)
    assert len(repo(hub).branches["main"]) == 2 and hub.uploads == 1
    assert push(folder).oid == first.oid
    assert len(repo(hub).branches["main"]) == 2 and hub.uploads == 1
    rows = generate_rows()
    push_dataset(rows, "user/data")
    push_dataset(rows, "user/data")
    assert len(repo(hub, "datasets", "user/data").branches["main"]) == 2


def generate_rows(count=4):
    return Dataset.from_list(
        [
            {
                "prompt": "a", "input_ids": [5, 6, 7, 0], "prompt_length": 2, "response": "b", "num_forward_passes": 2,
                "unmasking_step": [0, 1], "correct": i % 2 == 0, "seed": 0, "settings": '{"unmasking": "confidence"}',
            }
            for i in range(count)
        ]
    )  # fmt: skip


def test_what_an_earlier_push_left_goes(hub, folder, model, word_tokenizer, capsys):
    model.save_pretrained(folder.parent / "sharded", max_shard_size="100KB")
    word_tokenizer.save_pretrained(folder.parent / "sharded")
    push(folder)
    branch = HfApi(endpoint=hub.url)
    branch.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="user/model")
    old = [
        "model-00002-of-00002.safetensors", "training_args.bin", "unmasking_filter/model.safetensors", "canvas.py",
        "adapter_config.json", "adapter_model.safetensors", "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    theirs = ["handler.py", "examples/canvas.py", "checkpoint-1/model.safetensors", "checkpoint-1/training_args.bin"]
    for name in (*old, *theirs):
        branch.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="user/model")
    old.remove("canvas.py")  # is pushed anew
    push(folder)
    files = repo(hub).files()
    assert not set(old) & set(files) and {"notes.txt", "canvas.py", *theirs} <= set(files)
    assert (
        f"Going from user/model, left by an earlier push or training: {', '.join(sorted(old))}"
        in capsys.readouterr().out
    )
    assert len([name for name in files if name.endswith(".safetensors") and "/" not in name]) == 1


@pytest.mark.slow
def test_a_training_names_the_datasets_that_it_was_given(hub):
    push_dataset(generate_rows(), "user/data")
    code = """
from datasets import load_dataset
from dparallel.trainer.training_record import hub_datasets
rows = load_dataset("user/data", split="train")
print(hub_datasets(rows.filter(lambda row: row["correct"]), rows.select_columns(["input_ids"])), hub_datasets(None))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hub.environment)
    assert result.stdout == "['user/data'] []\n", result.stderr


def test_splits_travel(hub):
    push_dataset(DatasetDict(train=generate_rows(5), test=generate_rows(2)), "user/data", license="apache-2.0")
    code = "from datasets import load_dataset\nprint({k: len(v) for k, v in load_dataset('user/data').items()})"
    assert run(hub, code).strip() == "{'train': 5, 'test': 2}"


@pytest.mark.parametrize("settings", [{"private": True}, {"revision": "v2"}, {"create_pr": True}], ids=str)
def test_where_it_goes(hub, folder, settings):
    commit = push(folder, **settings)
    branches = {name: len(commits) for name, commits in repo(hub).branches.items()}
    assert repo(hub).private == settings.get("private", False)
    if settings.get("create_pr"):
        assert commit.pr_url.endswith("/user/model/discussions/1") and branches == {"main": 1, "refs/pr/1": 2}
    elif "revision" in settings:
        assert branches == {"main": 1, "v2": 2} or branches == {"main": 1, "v2": 3}
    else:
        assert branches == {"main": 2}


def test_a_dry_run_connects_to_nobody(hub, folder, tmp_path, capsys):
    requests = len(hub.requests)
    assert push(folder, dry_run=tmp_path / "dry") is None
    assert len(hub.requests) == requests and not hub.repos
    listed = capsys.readouterr().out
    written = [path.name for path in (tmp_path / "dry").iterdir()]
    assert all(name in listed for name in written) and {"README.md", "model.safetensors"} <= set(written)
    with pytest.raises(ValueError, match=r"`dry_run=.*dry'` is not empty"):
        push(folder, dry_run=tmp_path / "dry")


@pytest.mark.parametrize(
    ("method", "path", "status", "when"),
    [
        ("POST", "/preupload/", 500, "before"),
        ("PUT", "/storage/", 503, "before"),
        ("PUT", "/storage/", None, "before"),
        ("POST", "/commit/", 500, "before"),
        ("POST", "/commit/", None, "before"),
        ("POST", "/commit/", 500, "after"),
    ],
)
def test_what_passes_is_tried_again(hub, folder, quick, method, path, status, when):
    hub.fail(method, path, status, when=when)
    commit = push(folder)
    assert commit.oid == repo(hub).head() and quick
    assert len(repo(hub).branches["main"]) == 2  # one commit, whatever happened
    assert "model.safetensors" in repo(hub).files()


@pytest.mark.parametrize(("method", "path"), [("PUT", "/storage/"), ("POST", "/commit/")])
def test_a_push_that_broke_off_goes_on(hub, folder, quick, method, path):
    hub.fail(method, path, status=500, times=1000)
    with pytest.raises(RuntimeError, match=r"The Hub failed \(status 500\).*goes on where it was"):
        push(folder)
    assert not repo(hub).files()  # never half a model
    hub.faults.clear()
    uploads = hub.uploads
    push(folder)
    assert "model.safetensors" in repo(hub).files() and hub.uploads == (1 if path == "/storage/" else uploads)


def test_somebody_else_commits_meanwhile(hub, folder, quick):
    push(folder, commit_message="first")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 48, "do_sample": false}')
    api, create = HfApi(endpoint=hub.url), HfApi.create_commit

    def interrupted(self, *arguments, **keywords):
        HfApi.create_commit = create
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id="user/model")
        return create(self, *arguments, **keywords)

    HfApi.create_commit = interrupted
    try:
        with pytest.raises(RuntimeError, match="Somebody committed to user/model during this push"):
            push(folder)
    finally:
        HfApi.create_commit = create
    assert repo(hub).messages() == ["initial commit", "first", "Upload notes.txt with huggingface_hub"]
    push(folder)
    assert b"48" in repo(hub).files()["generation_config.json"].content and "notes.txt" in repo(hub).files()


def test_somebody_else_commits_between_two_attempts(hub, folder, monkeypatch):
    push(folder, commit_message="first")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 48, "do_sample": false}')
    api = HfApi(endpoint=hub.url)
    monkeypatch.setattr(
        time, "sleep", lambda _: api.upload_file(path_or_fileobj=b"1", path_in_repo="theirs.txt", repo_id="user/model")
    )
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(RuntimeError, match="Somebody committed to user/model during this push"):
        push(folder)
    assert repo(hub).messages()[1:] == ["first", "Upload theirs.txt with huggingface_hub"]


def test_who_may_not(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.reader_token)
    with pytest.raises(PermissionError, match="This token may not write to user/model"):
        push(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match=r"does not know who you are: `hf auth login`"):
        push(folder)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=r"does not know who you are: `hf auth login`"):
        push(folder)
    assert not hub.repos


def test_a_public_repository_is_not_taken_for_private(hub, folder):
    push(folder)
    with pytest.raises(ValueError, match="`private=True`, but user/model is there already and public"):
        push(folder, private=True)


def test_the_token_is_nowhere(hub, folder, quick, capfd, caplog, tmp_path):
    with caplog.at_level(logging.DEBUG):
        push(folder, dry_run=tmp_path / "dry")
        push(folder)
        hub.fail("POST", "/commit/", times=1000)
        (folder / "generation_config.json").write_text('{"max_new_tokens": 48}')
        with pytest.raises(RuntimeError) as error:
            push(folder)
    chain, each = "", error.value
    while each is not None:
        chain, each = chain + str(each), each.__cause__
    written = b"".join(path.read_bytes() for path in (tmp_path / "dry").iterdir() if path.is_file())
    for text in (*capfd.readouterr(), caplog.text, chain, written.decode(errors="ignore")):
        assert hub.token not in text
    pushed = b"".join(blob.content for blob in repo(hub).files().values())
    assert hub.token.encode() not in pushed


def test_edited_code_is_noticed(hub, folder, caplog, monkeypatch):
    path = next(folder.glob("modeling_*.py"))
    path.write_text(path.read_text() + "\n# mine\n")
    push(folder)
    assert f"{path} differs from the installed dparallel's {path.name}, which is pushed instead" in caplog.text
    assert b"# mine" not in repo(hub).files()[path.name].content


def test_wrong_arguments(folder, tmp_path):
    for repo_id in ("model", "a/b/c", 5, "us er/model"):
        with pytest.raises(ValueError, match=r"`repo_id=.*` is not allowed: it must be 'user/name'"):
            push_model(folder, repo_id, dry_run=tmp_path / "dry")
    with pytest.raises(ValueError, match=r"`model='nowhere'` is not allowed"):
        push("nowhere")
    with pytest.raises(ValueError, match=r"`base_model='nowhere'` is not allowed"):
        push(folder, base_model="nowhere")
    with pytest.raises(ValueError, match=r"`dataset=.*made'` must be a folder that `save_to_disk` wrote"):
        push_dataset(folder, "user/data")
    with pytest.raises(ValueError, match=r"The split 'train' lacks \['input_ids', 'num_forward_passes'"):
        push_dataset(Dataset.from_list(ROWS), "user/data")
    with pytest.raises(ValueError, match=r"`revision='v2'` is not allowed with `create_pr`"):
        push(folder, revision="v2", create_pr=True)
    (folder / "results.json").write_text('{"measurements": [{"task": "GSM8K"}]}')
    with pytest.raises(ValueError, match=r"measurement 0 lacks \['accuracy', 'dataset'"):
        push(folder)


def test_what_does_not_run_is_not_pushed(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", "unused")
    monkeypatch.setattr("dparallel.hub_cards.pushing.usage_snippet", lambda *_: "raise SystemError('broken')")
    with pytest.raises(RuntimeError, match=r"(?s)The usage snippet does not run.*SystemError: broken"):
        push(folder, run_snippet=True)
    assert not hub.repos


@pytest.mark.parametrize("family", MOSTLY_SLOW, indirect=True)
@pytest.mark.journey
def test_adapters_merged_or_not(hub, family, model, word_tokenizer, tmp_path):
    base = save(model, tmp_path / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, base_model_name_or_path=base)
    adapted = get_peft_model(family.model.from_pretrained(base), config).eval()
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", merge=False, tokenizer=word_tokenizer, base_model=base)
    assert "adapter_model.safetensors" in repo(hub).files() and "model.safetensors" not in repo(hub).files()
    push_model(tmp_path / "adapter", "user/merged", tokenizer=word_tokenizer, base_model=base, run_snippet=False)
    card = ModelCard(repo(hub, name="user/merged").files()["README.md"].content.decode())
    assert str(tmp_path) not in str(card)
    code = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/merged", trust_remote_code=True, dtype="float32").eval()
torch.save(model(torch.arange(300, 320)[None]).logits.detach(), sys.argv[1])
"""
    run(hub, code, str(tmp_path / "logits.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("measured", ["made", "user/model", "other", "user/other"])
def test_numbers_of_another_model_are_under_its_name(folder, tmp_path, measured, caplog):
    (tmp_path / "results.json").write_text(json.dumps({"measurements": [MEASUREMENT | {"checkpoint": measured}]}))
    push(folder, results=[tmp_path / "results.json"], dry_run=tmp_path / "dry")
    card = (tmp_path / "dry" / "README.md").read_text()
    is_other = measured.endswith("other")
    assert (f"| {measured} |" in card) == is_other and ("| this |" in card) != is_other
    assert ("model-index" in card) != is_other and (f"numbers of '{measured}'" in caplog.text) == is_other


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_numbers_of_a_threshold_that_has_changed_since(folder, tmp_path, threshold, caplog):
    """As saved with the model: but then calibration saved another one."""
    changes = {"decoding": {}, "resolved_decoding": {"unmasking": "entropy_threshold", "threshold": threshold}}
    (tmp_path / "results.json").write_text(json.dumps({"measurements": [MEASUREMENT | changes]}))
    push(folder, results=[tmp_path / "results.json"], dry_run=tmp_path / "dry")
    assert ("with {'threshold': 0.5}" in caplog.text and "Measure it again" in caplog.text) == (threshold == 0.5)


@pytest.mark.slow
def test_the_example(hub, word_model):
    result = call("push_to_hub.py", CHECKPOINT, "user/example")
    assert result.returncode == 0, result.stderr
    pushed = f"{hub.url}/user/example/commit/{repo(hub, name='user/example').head()}"
    assert result.stdout.splitlines()[-1].startswith(f"Pushed as {pushed}. Next: ")
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("user/example", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("user/example", trust_remote_code=True, dtype="float32")
print(model.generate(**tokenizer("Sam has 3 books.", return_tensors="pt"), do_sample=False).tolist())
"""
    ids = AutoTokenizer.from_pretrained(CHECKPOINT)("Sam has 3 books.", return_tensors="pt")
    assert run(hub, code).strip() == str(word_model.generate(**ids, do_sample=False).tolist())


@pytest.mark.journey
def test_all_that_a_save_leaves_is_pushed(hub, folder, model, word_tokenizer, tmp_path):
    """Shards, a filter, several chat templates and license texts; and no pickle."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}", "rag": "{{ tools }}"}
    model.set_unmasking_filter(UnmaskingFilter(UnmaskingFilterConfig()))
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    for name in ("LICENSE", "NOTICE.txt"):
        (folder / name).write_text("Mine.")
    torch.save({}, folder / "training_args.bin")
    push(folder, dry_run=tmp_path / "dry")
    push(folder)
    staged, saved = (
        {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "dry", folder)
    )
    pushed = set(repo(hub).files())
    assert pushed == staged and not [name for name in pushed if name.endswith(".bin")]
    assert {name for name in saved if "model-0" not in name and "index" not in name} - pushed == {"training_args.bin"}
    code = """
from transformers import AutoTokenizer
print(sorted(AutoTokenizer.from_pretrained("user/model", trust_remote_code=True).chat_template))
"""
    assert run(hub, code).strip() == "['default', 'rag', 'tool_use']"


def test_metadata_is_checked_before_anything_is_loaded(hub, folder, tmp_path, caplog):
    wrong = {"license": "Apache 2.0", "language": ["English"]}
    for card in (*({name: value} for name, value in wrong.items()), {"datasets": ["rows.jsonl"]}):
        with pytest.raises(ValueError, match=f"`{next(iter(card))}=.*is not allowed"):
            push_model("/nowhere", "user/x", **card)
    for card in (*({name: value} for name, value in wrong.items()), {"sources": "rows.jsonl"}, {"model": "."}):
        with pytest.raises(ValueError, match=f"`{next(iter(card))}=.*is not allowed"):
            push_dataset("/nowhere", "user/x", **card)
    with pytest.raises(ValueError, match=r"\['licence'\] are no arguments of a card"):
        push_model("/nowhere", "user/x", licence="mit")
    assert not hub.repos
    push(folder, dry_run=tmp_path / "dry", **wrong, datasets=["rows.jsonl", "a/b"])
    text = (tmp_path / "dry" / "README.md").read_text()
    assert all(word in caplog.text for word in ("Apache 2.0", "English", "rows.jsonl", "A push would end here"))
    assert not [word for word in ("Apache 2.0", "English", "rows.jsonl") if word in text]


@pytest.mark.parametrize(
    ("answer", "flaw"),
    [
        ([5, 6, 7, 0], None),
        ([5, 6, 0, 0, 0], None),
        ([5, 0], None),
        ([5, 5, 5, 0], None),
        ([0, 0, 0], "is empty"),
        ([], "has no text"),
        ([1, 1, 1], "has no text"),
        ([2, 1, 0, 5], "has no text"),
        ([5] * 40, "repeats itself"),
        ([5, 5, 5, 5, 0], "repeats itself"),
        ([5, 6] * 20 + [0], "repeats itself"),
        ([5, 6, 7, 8], "has no end within its 4 tokens"),
        (list(range(5, 45)), "has no end within its 40 tokens"),
    ],
)
def test_what_is_no_answer_is_told_from_one(answer, flaw):
    assert flaw_of(answer, [0], [0, 1, 2]) == flaw


@pytest.mark.journey
def test_a_good_answer_is_not_flagged(tmp_path, caplog):
    question = "Nora has 12 shells. Nora finds 8 more. How many shells does Nora have now?"
    push(CHECKPOINT.parent / "student", run_snippet=True, dry_run=tmp_path / "dry", prompt=question)
    assert "sample prompt" not in caplog.text and "is 20." in (tmp_path / "dry" / "README.md").read_text()


def test_what_was_distilled_in_memory_has_a_full_card(family, small_model, word_tokenizer, tmp_path, monkeypatch):
    """As in the README: data of the Hub, trajectories that were never saved, a base model from a folder."""
    monkeypatch.chdir(tmp_path)
    cached = Path("datasets", "user___prompts", "default", "0.0.0", "0123")  # as `load_dataset` leaves it
    generate_rows(6).select_columns(["prompt"]).save_to_disk(cached)
    small_model().save_pretrained("my-base")
    model = family.model.from_pretrained("my-base")
    prompts = Dataset.from_file(str(next(cached.glob("*.arrow"))))
    rows = generate_trajectories(model, word_tokenizer, prompts, "shards", lambda row: True, max_new_tokens=8)
    args = CertaintyForcingConfig(
        "out", max_steps=1, max_length=32, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer = CertaintyForcingTrainer(
        model, args, train_dataset=rows.filter(lambda row: row["correct"]), processing_class=word_tokenizer,
        peft_config=LoraConfig(r=2),
    )  # fmt: skip
    trainer.train()
    push_model(trainer.model, "user/a", tokenizer=word_tokenizer, merge=False, run_snippet=False, dry_run="adapter")
    merge_adapter(trainer.model, "merged", word_tokenizer, unmasking="entropy_threshold", threshold=0.4)
    push("merged", dry_run="dry")
    for folder, made in (("dry", "finetune"), ("adapter", "adapter")):
        text = Path(folder, "README.md").read_text(encoding="utf-8")
        assert "made from `my-base` by certainty-forcing distillation" in text and str(tmp_path) not in text, made
        assert "- user/prompts\n" in text and "/datasets/user/prompts), 6 examples." in text
        assert "`lr_scheduler_type`: cosine" in text and "SchedulerType" not in text
    assert "`threshold`: `0.4`" in Path("dry", "README.md").read_text(encoding="utf-8")
    assert 'unmasking="entropy_threshold", threshold=0.5' in Path("adapter", "README.md").read_text(encoding="utf-8")
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/.cache/huggingface/hub/models--user--model/snapshots/0123abcd", "user/model"),
        ("/home/me/models/llada", "llada"),
        ("user/model", "user/model"),
        ("", ""),
    ],
)
def test_what_a_card_calls_a_base_model(source, name):
    assert _model_name(source) == name


@pytest.mark.parametrize(("adapter_name", "new_tokens"), [("default", 8), ("mine", 0)])
def test_the_snippet_of_an_adapter(family, model, tmp_path, adapter_name, new_tokens):
    """It runs as it stands, whatever the adapter's name, after tokens were added, and with the distilled policy."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = family.model.from_pretrained(save(model, tmp_path / "base"))
    if new_tokens:
        tokenizer.add_tokens([f"<{number}>" for number in range(new_tokens)])
        model.resize_token_embeddings(592 + new_tokens, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name=adapter_name).eval()
    adapted.training_record = {"decoding": {"unmasking": "confidence", "steps": 32}, "method": "x", "arguments": {}}
    push_model(adapted, "user/x", tokenizer=tokenizer, merge=False, run_snippet=False, dry_run=tmp_path / "dry")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "dry" / "README.md").read_text(), re.DOTALL)[1]
    assert 'unmasking="confidence", steps=32' in code
    printed, scope = StringIO(), {}
    with redirect_stdout(printed):
        exec(code.replace("user/x", str(tmp_path / "dry")), scope)
    assert printed.getvalue().splitlines()[-1] == "32 forward passes"
    assert scope["model"].generation_config.unmasking == "confidence"
    ids = torch.arange(300, 320)[None]
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_adapters_that_nobody_could_load(hub, family, model, word_tokenizer, tmp_path, caplog):
    base = save(model, tmp_path / "base")
    adapted = get_peft_model(family.model.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = {"tokenizer": word_tokenizer, "merge": False}
    push(tmp_path / "adapter", **settings)
    assert f"its base model, {base!r}, is no Hub id" in caplog.text
    push(tmp_path / "adapter", **settings, base_model="user/base", license="mit")
    pushed = json.loads(repo(hub).files()["adapter_config.json"].content)
    assert pushed["base_model_name_or_path"] == "user/base"
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"`model=.*adapter'` must hold the adapter's weights as"):
        push(tmp_path / "adapter", **settings)


@pytest.mark.parametrize("place", ["", "dataset", "trajectories/dataset"])
def test_where_trajectories_lie(tmp_path, place):
    generate_rows(3).save_to_disk(tmp_path / "made" / place)
    push_dataset(tmp_path / "made", "user/x", dry_run=tmp_path / "dry")
    assert len(Dataset.from_parquet(str(next((tmp_path / "dry" / "data").iterdir())))) == 3


def test_an_adapter_that_transformers_loaded(family, model, word_tokenizer, tmp_path):
    """`save_pretrained` would leave its base model out."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = family.small()
    plain.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"`model` has an adapter of `load_adapter\(\)`"):
        push(plain, tokenizer=word_tokenizer, dry_run=tmp_path / "dry")


def test_shards_alone_are_no_dataset(small_model, word_tokenizer, tmp_path):
    prompts = Dataset.from_list([{"prompt": "Sam"}])
    generate_trajectories(small_model(), word_tokenizer, prompts, tmp_path / "out" / "trajectories", max_new_tokens=8)
    for folder in (tmp_path / "out", tmp_path / "out" / "trajectories"):
        with pytest.raises(ValueError, match=r"holds the shards of `generate_trajectories`.*push the dataset"):
            push_dataset(folder, "user/x", dry_run=tmp_path / "dry")


@pytest.mark.parametrize("family", ["llada"], indirect=True)
def test_the_commands(hub, folder, tmp_path):
    generate_rows().save_to_disk(tmp_path / "rows")
    for command, *flags in (
        ["push_model", folder, "user/model", "--private", "--skip-snippet"],
        ["push_dataset", tmp_path / "rows", "user/rows", "--license", "mit"],
    ):
        result = call(f"dparallel.hub_cards.{command}", *flags)
        assert result.returncode == 0, result.stderr
        assert "README.md" in result.stdout and f"{hub.url}/" in result.stdout.splitlines()[-1]
        assert "RuntimeWarning" not in result.stderr
    for command, *flags in (
        ["push_model", folder, "user/other", "--license", "Apache 2.0"],
        ["push_dataset", tmp_path / "rows", "user/other", "--language", "English"],
    ):
        result = call(f"dparallel.hub_cards.{command}", *flags)
        assert result.returncode == 1 and f"ValueError: `{flags[2][2:]}=" in result.stderr
        assert "Traceback" not in result.stderr
    flags = tmp_path / "rows", "user/rows"
    again = call("dparallel.hub_cards.push_dataset", *flags, HF_TOKEN="hf_wrong")
    assert again.returncode == 1 and "PermissionError: The Hub does not know who you are" in again.stderr
    assert "Traceback" not in again.stderr
    assert repo(hub).private and repo(hub, "datasets", "user/rows").files()
    assert os.environ.get("HF_TOKEN") == hub.token
