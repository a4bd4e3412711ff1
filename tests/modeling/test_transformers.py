"""The example model through what users have: remote code, pipelines, streamers."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

import dparallel.modeling
from dparallel.modeling import DiffusionGenerationConfig, LLaDAModelLM
from tests.families import ALL_FAMILIES
from tests.golden import CHECKPOINT, STUDENT
from tests.scripts import load

CODE = CHECKPOINT.parents[2] / "modeling"
QUESTION = "Nora has 12 shells. Nora finds 8 more. How many shells are left?"


@pytest.fixture(scope="module")
def inputs(word_tokenizer):
    return word_tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def test_auto_classes_give_the_class_with_the_head(family):
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(family.golden)) is family.model


def test_installed_code_wins_over_older_remote_code(family, tmp_path):
    """The official repositories carry remote code that does not run under transformers 5."""
    folder = tmp_path / "official"
    shutil.copytree(family.golden, folder)
    config = json.loads((folder / "config.json").read_text())
    codes = {"AutoConfig": family.config, "AutoModel": family.model, "AutoModelForCausalLM": family.model}
    auto_map = {auto: f"{code.__module__.rpartition('.')[2]}.{code.__name__}" for auto, code in codes.items()}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    for name in (f"configuration_{family.name}", f"modeling_{family.name}"):
        (folder / f"{name}.py").write_text("raise RuntimeError('the old remote code ran')")
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(folder, trust_remote_code=True)) is family.model


STRANGER = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dparallel":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

first, second, prompt = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = {"config": type(AutoConfig.from_pretrained(first, trust_remote_code=True)).__name__}
loads = [("model", AutoModel, first), ("first", AutoModelForCausalLM, first), ("second", AutoModelForCausalLM, second)]
for name, auto, folder in loads:
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    output = model.generate(torch.tensor([prompt]), return_dict_in_generate=True)
    found[name] = [output.sequences[0].tolist(), output.num_forward_passes.item(), model.generation_config.threshold]
    if name == "first":
        model.save_pretrained(second)
        AutoTokenizer.from_pretrained(first, trust_remote_code=True).save_pretrained(second)
found["text"] = AutoTokenizer.from_pretrained(second, trust_remote_code=True).decode(output.sequences[0])
found["modules"] = sorted(m for m in sys.modules if m.startswith("dparallel"))
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "source",
    ["dream", *(pytest.param(name, marks=pytest.mark.slow) for name in ("teacher", "student", "llada", "sdar"))],
)
@pytest.mark.journey
def test_remote_code_round_trip_without_the_package(source, word_model, word_tokenizer, inputs, tmp_path):
    """From the folders in the repository, and from a saved model of each family."""
    folder, threshold, config = CHECKPOINT, None, "LLaDAConfig"
    if source == "teacher":
        model = word_model
    elif source == "student":
        folder, threshold = STUDENT, 0.1
        model = LLaDAModelLM.from_pretrained(STUDENT, dtype=torch.float32)
    else:
        folder, threshold, config = tmp_path / "saved", 0.4, ALL_FAMILIES[source].config.__name__
        model = ALL_FAMILIES[source].make(vocab_size=592, mask_token_id=1, eos_token_id=0, pad_token_id=0).eval()
        model.generation_config.update(unmasking="entropy_threshold", threshold=threshold, max_new_tokens=40)
        model.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
    prompt = inputs["input_ids"][0].tolist()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "again"), json.dumps(prompt)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected = model.generate(**inputs, return_dict_in_generate=True)
    assert found["config"] == config and found["modules"] == []
    for name in ("model", "first", "second"):
        assert found[name] == [
            expected.sequences[0].tolist(),
            expected.num_forward_passes.item(),
            threshold,
        ]
    assert found["text"] == word_tokenizer.decode(expected.sequences[0])


SHARED = {
    "block_cache",
    "block_schedule",
    "canvas",
    "captured_step",
    "decoding_loop",
    "draws",
    "generation_batch",
    "generation_config_diffusion",
    "generation_diffusion",
    "generation_inputs",
    "generation_outputs",
    "language_model",
    "layers",
    "logits_processing",
    "packed_projections",
    "stopping",
    "token_statistics",
    "triton_kernels",
    "unmasking",
    "unmasking_filter",
}


def test_saved_folder_holds_all_remote_code_and_nothing_else(family, reader, tmp_path):
    reader.save_pretrained(tmp_path)
    names = {f"configuration_{family.name}", f"modeling_{family.name}", *SHARED}
    names |= {"generation_dream"} if family.name == "dream" else set()
    if family.name == "sdar":  # which takes Dream's layers
        names |= {"configuration_dream", "modeling_dream", "generation_dream"}
    assert {path.stem for path in tmp_path.glob("*.py")} == names
    for name in names:
        assert (tmp_path / f"{name}.py").read_text() == (CODE / f"{name}.py").read_text()


@pytest.mark.parametrize("folder", [CHECKPOINT, STUDENT], ids=["teacher", "student"])
def test_the_box_has_the_same_code(folder):
    assert {path.stem for path in folder.glob("*.py")} == {"configuration_llada", "modeling_llada", *SHARED}
    assert not [path for path in folder.iterdir() if path.is_symlink()]  # a checkout on Windows has none
    copies = load("word_problems/renew_copies.py").originals()
    differ = [copy.name for copy, original in copies.items() if copy.read_bytes() != original.read_bytes()]
    assert not differ, "run: python examples/word_problems/renew_copies.py"


@pytest.mark.parametrize("folder", [CHECKPOINT, STUDENT], ids=["teacher", "student"])
def test_the_box_is_small(folder):
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {"README.md", "model.safetensors", "generation_config.json"} <= {path.name for path in files}


def test_model_in_the_box_solves_a_problem(word_model, word_tokenizer, inputs):
    for settings in ({}, {"unmasking": "entropy_threshold"}, {"unmasking": "confidence"}):
        ids = word_model.generate(**inputs, **settings)
        assert "The answer is 20." in word_tokenizer.decode(ids[0])


def test_student_in_the_box_needs_few_passes():
    """The teacher needs 74 for these at one token a pass."""
    student = LLaDAModelLM.from_pretrained(STUDENT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
    generator, solving = load("word_problems/problems.py"), load("word_problems/solving.py")
    problems = list(itertools.islice(generator.generate_problems("test", 12, generator.TEST_SEED), 12))
    result = solving.evaluate(student, tokenizer, problems, "student", batch_size=4)
    assert sum(result.correct) >= 11 and result.nfe < 7


def test_pipeline(reader, word_tokenizer, inputs):
    pipe = pipeline("text-generation", model=reader, tokenizer=word_tokenizer)
    start = inputs["input_ids"].shape[1]
    expected = word_tokenizer.decode(
        reader.generate(**inputs)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    chat = [{"role": "user", "content": QUESTION}]
    assert pipe(chat)[0]["generated_text"][-1] == {"role": "assistant", "content": expected}
    prompt = word_tokenizer.decode(inputs["input_ids"][0])
    texts = pipe([prompt, prompt.replace("12", "13")], batch_size=2, return_full_text=False, add_special_tokens=False)
    assert texts[0][0]["generated_text"].replace("<|endoftext|>", "") == expected
    # A policy named here brings its own default, not the number of the pipeline's copy of the configuration.
    by_entropy = pipe(chat, unmasking="entropy_threshold")[0]["generated_text"][-1]["content"]
    ids = reader.generate(**inputs, unmasking="entropy_threshold", threshold=0.5)
    assert by_entropy == word_tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_text_streamers_print_what_is_returned(reader, word_tokenizer, inputs, capsys):
    ids = reader.generate(**inputs, streamer=TextStreamer(word_tokenizer, skip_prompt=True))
    answer = word_tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    end = "<|endoftext|>" if ids[0, -1] == word_tokenizer.pad_token_id else ""
    assert capsys.readouterr().out == answer + end + "\n"
    streamer = TextIteratorStreamer(word_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=300)
    thread = threading.Thread(target=reader.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == answer and len(pieces) > 3


def test_stop_strings_cut_inside_a_block(reader, word_tokenizer, inputs):
    start = inputs["input_ids"].shape[1]
    full = reader.generate(**inputs)[0, start:]
    words = [word_tokenizer.decode(full[:i]) for i in (2, 3, 7, 41)]
    for stop in (words[0], words[1][-3:], words[2][-2:], words[3][-9:]):
        output = reader.generate(**inputs, stop_strings=[stop, "never"], tokenizer=word_tokenizer)[0, start:]
        length = next(i for i in range(1, 129) if stop in word_tokenizer.decode(full[:i]))
        assert output[:length].tolist() == full[:length].tolist()
        assert (output[length:] == word_tokenizer.pad_token_id).all()
    with pytest.raises(ValueError, match="tokenizer"):
        reader.generate(**inputs, stop_strings=["="])


def test_loading_with_a_generation_config_of_ones_own(family):
    model = family.load(generation_config=DiffusionGenerationConfig(unmasking="margin", steps=7))
    assert (model.generation_config.unmasking, model.generation_config.steps) == ("margin", 7)
    assert dparallel.modeling.POLICIES["margin"].is_scheduled


def test_a_model_in_a_subfolder(family, reader, tmp_path):
    """transformers looks for remote code in the root of a repository alone; with this package none is needed."""
    reader.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="model", trust_remote_code=True)
    assert type(loaded) is family.model
    assert loaded.generation_config.to_dict() == reader.generation_config.to_dict()
