"""The study on real weights, in small: a teacher of random weights, and three tests of two problems each."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dparallel.evaluation.metrics import accuracy_under_parallelism
from dparallel.hub_cards.measurements import from_entries
from tests.families import FAMILIES
from tests.golden import CHECKPOINT
from tests.scripts import load

study = load("gsm8k/study.py")
VARIANTS = ["trajectory loss only", "both losses", "both losses, LoRA", "both losses, second round"]


@pytest.fixture
def flags(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = FAMILIES["llada"].small(hidden_size=64)
    model.config.block_causal_length = 16
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    rows = [{"question": f"Sam has {i} beads. How many beads does Sam have?", "answer": f"#### {i}"} for i in range(8)]
    for name in ("gsm8k_rest", "symbolic_seen", "symbolic_unseen", "prompts"):
        lines = "".join(json.dumps(row) + "\n" for row in rows[: 8 if name == "prompts" else 2])
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(study, "ANSWER_LENGTH", 16)
    monkeypatch.setattr(study, "TEACHER_GRID", {"confidence": [16], "entropy_threshold": [0.1, 9.0]})
    monkeypatch.setattr(study, "STUDENT_GRID", {"entropy_threshold": [0.1, 9.0]})
    for task in study.TASKS.values():
        monkeypatch.setitem(task.__dict__, "max_new_tokens", 16)
    words = f"--teacher {tmp_path / 'teacher'} --rows {tmp_path} --output_dir {tmp_path / 'out'} --num_prompts 4"
    return f"{words} --max_steps 1 --batch_size 2 --decoding_batch_size 2 --learning_rate 1e-3".split()


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["study.py", *flags])
    study.main()


@pytest.mark.journey
def test_the_study_runs_and_goes_on(flags, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *flags, "--until", "curves", "--seeds", "0", "--variants", VARIANTS[1])
    assert "| model |" not in capsys.readouterr().out
    flags += ["--seeds", "0", "1", "--variants", *VARIANTS]
    run(monkeypatch, *flags)
    first = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for name in (*VARIANTS, "teacher, confidence", "teacher, entropy threshold"):
        assert first.count(f"| {name} |") == 3, name
    results = json.loads((tmp_path / "out" / "study.json").read_text(encoding="utf-8"))
    assert {name: len(curves) for name, curves in results["students"].items()} == dict(
        zip(VARIANTS, (2, 2, 1, 1), strict=True)
    )
    points = from_entries(results["students"]["both losses"][0]["gsm8k"], "study.json")
    assert [point.decoding["threshold"] for point in points] == [0.1, 9.0] and points[0].num_examples == 2
    for name in study.TASKS:
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    models = {name: study.AutoModelForCausalLM.from_pretrained(path / "model") for name, path in of(tmp_path).items()}
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").state_dict()
    for name, model in models.items():  # each has learned something, each something else
        assert any((weight.float() != teacher[key]).any() for key, weight in model.state_dict().items()), name
        assert model.generation_config.unmasking == "entropy_threshold", name  # as a student is shipped
    assert all((path / "model" / "training.json").exists() for path in of(tmp_path).values())
    capsys.readouterr()
    run(monkeypatch, *flags)
    assert "train_loss" not in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == first


@pytest.mark.journey
def test_students_of_other_answers_are_not_taken_for_these(flags, tmp_path, monkeypatch):
    flags += ["--until", "curves", "--seeds", "0", "--variants", "both losses"]
    run(monkeypatch, *flags)
    shutil.rmtree(tmp_path / "out" / "trajectories")
    prompts = (tmp_path / "prompts.jsonl").read_text(encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(prompts.replace("Sam", "Ann"), encoding="utf-8")
    with pytest.raises(SystemExit, match="other settings: `answers`"):
        run(monkeypatch, *flags)
    flags[flags.index("--num_prompts") + 1] = "9"
    with pytest.raises(SystemExit, match="`num_prompts=9` is not allowed"):
        run(monkeypatch, *flags, "--output_dir", str(tmp_path / "other"))


def of(folder):
    return {path.name: path for path in (folder / "out" / "students").iterdir()}


class Point:
    """What of a measurement a report reads."""

    def __init__(self, unmasking, nfe, verdicts):
        self.decoding, self.settings, self.nfe = {"unmasking": unmasking}, f"{unmasking} {nfe}", nfe
        self.verdicts, self.accuracy, self.tpf = verdicts, sum(verdicts) / len(verdicts), 60 / nfe


def curve(*points):
    return {"points": list(points), "verdicts": [point.verdicts for point in points]}


def right(count):
    return [True] * count + [False] * (1000 - count)


def test_what_decides_is_the_interval_and_not_the_mean():
    teacher = curve(Point("confidence", 80, right(700)), Point("entropy_threshold", 20, right(690)))
    assert study.best_of_teacher(teacher) == 1  # one token a pass is no threshold
    student = curve(
        Point("entropy_threshold", 12, right(685)),  # 0.5 points less, surely less than 2
        Point("entropy_threshold", 10, right(674)),  # 1.6 points less: it may be more than 2
        Point("entropy_bound", 5, right(690)),
    )
    assert study.fewest_passes(student, "entropy_threshold", right(690)).startswith(
        "12.0 (entropy_threshold 12): -0.5"
    )
    assert study.fewest_passes(student, "entropy_threshold", right(800)) == "none"


def test_areas_of_seeds_have_one_best_accuracy():
    seeds = [[Point("entropy_threshold", nfe, right(600)) for nfe in (10, 20)] for _ in range(2)]
    seeds[1].append(Point("entropy_threshold", 5, right(590)))
    one, other = (
        accuracy_under_parallelism([p.tpf for p in points], [100 * p.accuracy for p in points], 80) for points in seeds
    )
    areas = [study.aup_of(points, 0.8) for points in seeds]
    assert study.mean_and_range(areas[:1], 0) == f"{one:.0f}"
    assert study.mean_and_range(areas, 0) == f"{(one + other) / 2:.0f} ({one:.0f} to {other:.0f})"
