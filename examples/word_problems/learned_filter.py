"""Train Learn2PD's filter for the two example models, a teacher and its distilled student, and compare it with
thresholds.

Each model answers training problems one token a pass, an oracle that knows these answers decodes again, and a filter
learns what the oracle accepted: the published one, which reads confidences, and one that reads more. Thresholds are
chosen on validation problems: of each policy, the fastest whose accuracy is at most half a point below one token a
pass. Then everything solves the test problems, in answers of up to 128 and of up to 1,024 tokens. Prints tables and
writes JSON and the filters; what was computed is not computed again. The first two commands are for
a GPU, the third is a try on a CPU.

    python examples/word_problems/any_length.py --output_dir runs/any_length
    python examples/word_problems/learned_filter.py --models runs/any_length
    python examples/word_problems/learned_filter.py --prompts 24 --problems 8 --long_problems 0 --epochs 20
"""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from problems import NUM_TEST_PROBLEMS, TEST_SEED, generate_problems, to_conversation
from solving import ANSWER_LENGTH, evaluate, load_model
from transformers import AutoTokenizer

from dparallel.hub_cards import here_and_now
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.measurements import fastest
from dparallel.modeling import UnmaskingFilter, UnmaskingFilterConfig
from dparallel.trainer import (
    FilterConfig,
    FilterTrainer,
    acceptance_rates,
    generate_trajectories,
    oracle_passes,
    record_oracle,
    split_by_prompt,
)

HERE = Path(__file__).parent
FEATURES = {
    "filter": ["confidence"],
    "filter of log-odds": ["log_odds"],
    "richer filter": ["log_odds", "entropy", "margin", "masked", "position", "punctuation", "digit"],
}
SLOW = {"unmasking": "confidence", "steps": ANSWER_LENGTH}
CANDIDATES = {
    "confidence_threshold": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95],
    "entropy_threshold": [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    "learned_filter": [0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.98, 0.99],
}
ALLOWED_LOSS = 0.005
LONG_ANSWER_LENGTH = 1024
PROMPT_SEED, VALIDATION_SEED = 21, 123


class Study:
    """Numbers of one run, each computed once and kept in a file."""

    def __init__(self, arguments):
        self.arguments, self.path = arguments, arguments.output_dir / "results.json"
        asked = {name: str(getattr(arguments, name)) for name in ("models", "prompts", "epochs")}
        self.results = here_and_now() | {"asked": asked, "rows": {}}
        if self.path.exists():
            self.results = json.loads(self.path.read_text(encoding="utf-8"))
            if self.results.get("asked") != asked:
                raise SystemExit(
                    f"{self.path} is of {self.results.get('asked')}, not of {asked}: choose another folder."
                )
        self.is_gpu = torch.cuda.is_available()
        self.tokenizer = AutoTokenizer.from_pretrained(HERE / "checkpoint", padding_side="left")
        self.models, self.filters = {}, {}
        test = list(islice(generate_problems("test", NUM_TEST_PROBLEMS, TEST_SEED), arguments.problems))
        count = min(arguments.problems, 1000)
        self.problems = {
            "test": test,
            "long": test[: arguments.long_problems],
            "validation": list(islice(generate_problems("validation", count, VALIDATION_SEED), count)),
        }

    def model(self, name):
        if name not in self.models:
            example = HERE / {"teacher": "checkpoint", "student": "student"}[name]
            path = self.arguments.models / name if self.arguments.models else example
            self.models[name] = load_model(path)
        return self.models[name]

    def train_filters(self, name):
        folder, model = self.arguments.output_dir / name, self.model(name)
        targets = {kind: folder / kind.replace(" ", "-") for kind in FEATURES}
        if all(f"{name}, {kind}" in self.results.get("rates", {}) for kind in FEATURES):
            self.filters |= {(name, kind): UnmaskingFilter.from_pretrained(path) for kind, path in targets.items()}
            return
        problems = islice(generate_problems("train", self.arguments.prompts, PROMPT_SEED), self.arguments.prompts)
        prompts = Dataset.from_list([{"prompt": to_conversation(problem)["prompt"]} for problem in problems])
        batch_size = 1024 if self.is_gpu else 8
        slow = generate_trajectories(
            model, self.tokenizer, prompts, folder / "trajectories", batch_size=batch_size, shard_size=2048,
            max_new_tokens=ANSWER_LENGTH, **SLOW,
        )  # fmt: skip
        records = record_oracle(
            model, slow, folder / "records", max_new_tokens=ANSWER_LENGTH, batch_size=batch_size, shard_size=2048
        )
        self.results.setdefault("oracle", {})[name] = oracle_passes(records)
        rates = self.results.setdefault("rates", {})
        _, held_out = split_by_prompt(records, FilterConfig.eval_share)
        rates[f"{name}, confidence alone"] = acceptance_rates("confidence", held_out, CANDIDATES["learned_filter"])
        for kind, features in FEATURES.items():
            torch.manual_seed(0)
            config = UnmaskingFilterConfig(features=features, vocab_size=model.config.vocab_size)
            unmasking_filter = UnmaskingFilter(config)
            if config.reads_tokens:
                unmasking_filter.read_tokenizer(self.tokenizer)
            config = FilterConfig(
                str(targets[kind]), use_cpu=True, report_to="none", num_train_epochs=self.arguments.epochs,
                logging_strategy="no",
            )  # fmt: skip
            training, held_out = split_by_prompt(records, config.eval_share)
            trainer = FilterTrainer(unmasking_filter, config, training, held_out)
            trainer.train()
            rates[f"{name}, {kind}"] = acceptance_rates(trainer.model, held_out, CANDIDATES["learned_filter"])
            trainer.model.save_pretrained(targets[kind])
            self.filters[name, kind] = trainer.model
        self.save()

    def save(self):
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def measure(self, name, problems, kind=None, **settings):
        key = json.dumps([name, problems, len(self.problems[problems]), kind, settings])
        if key not in self.results["rows"]:
            extra = {} if kind is None else {"unmasking_filter": self.filters[name, kind]}
            batch_size = (256 if problems == "long" else 512) if self.is_gpu else 8
            arguments = (self.model(name), self.tokenizer, self.problems[problems])
            result = evaluate(*arguments, f"{name} {problems}", batch_size, **settings, **extra)
            row = {field: getattr(result, field) for field in ("nfe", "tpf", "seconds", "accuracy")}
            self.results["rows"][key] = row
            self.save()
        return self.results["rows"][key]

    def choose(self, name, unmasking, kind=None):
        """Of the thresholds of a policy, the fastest that is accurate enough on validation problems."""
        bar = self.measure("teacher", "validation", **SLOW)["accuracy"] - ALLOWED_LOSS
        decodings = [{"unmasking": unmasking, "threshold": threshold} for threshold in CANDIDATES[unmasking]]
        points = [
            SimpleNamespace(decoding=decoding, **self.measure(name, "validation", kind, **decoding))
            for decoding in decodings
        ]
        return (fastest(points, bar) or max(points, key=lambda point: point.accuracy)).decoding

    def table(self, problems, length):
        lines = [
            f"Answers of up to {length} tokens, {len(self.problems[problems])} problems:",
            "",
            "| | threshold | NFE | seconds | accuracy % |",
            "| --- | --- | --- | --- | --- |",
        ]

        def add(label, name, decoding, kind=None, **settings):
            row = self.measure(name, problems, kind, **decoding, **settings, max_new_tokens=length)
            threshold = f"{decoding['threshold']:g}" if "threshold" in decoding else ""
            lines.append(
                f"| {label} | {threshold} | {row['nfe']:.1f} | {row['seconds']:.1f} | {100 * row['accuracy']:.1f} |"
            )

        slow = {"unmasking": "confidence", "steps": length}
        add("teacher, one token a pass", "teacher", slow, stop_at_eos=False)
        add("the same, stopping at end-of-text", "teacher", slow)
        for unmasking in ("confidence_threshold", "entropy_threshold"):
            add(unmasking.replace("_", " "), "teacher", self.choose("teacher", unmasking))
        eotp = {"eos_threshold": 0.9}
        for kind in FEATURES:
            chosen = self.choose("teacher", "learned_filter", kind)
            add(kind, "teacher", chosen, kind)
            add(f"{kind}, end-of-text prediction", "teacher", chosen, kind, **eotp)
            add(f"{kind}, end-of-text prediction, dual cache", "teacher", chosen, kind, **eotp, block_cache="dual")
        best = self.choose("teacher", "entropy_threshold")
        add("entropy threshold, end-of-text prediction", "teacher", best, **eotp)
        add("student, entropy threshold", "student", self.choose("student", "entropy_threshold"))
        for kind in FEATURES:
            add(f"student, {kind}", "student", self.choose("student", "learned_filter", kind), kind)
        if length == ANSWER_LENGTH:
            for name, passes in self.results["oracle"].items():
                lines.append(f"| {name}, oracle (training problems) | | {passes:.1f} | | |")
        return lines


def main():
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/learned_filter"), help="folder for tables and filters"
    )
    parser.add_argument(
        "--models",
        type=Path,
        help="folder with models `teacher` and `student`, of any_length.py (default: the two example models)",
    )
    parser.add_argument(
        "--prompts", type=int, default=4096, help="number of problems whose answers the filters learn from"
    )
    parser.add_argument("--epochs", type=int, default=60, help="epochs of training a filter")
    parser.add_argument(
        "--problems", type=int, default=NUM_TEST_PROBLEMS, help="number of test problems, from 1 to 5000"
    )
    parser.add_argument(
        "--long_problems",
        type=int,
        default=500,
        help="number of test problems with answers of up to 1,024 tokens; 0 leaves them out",
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    study = Study(arguments)
    for name in ("teacher", "student"):
        study.train_filters(name)
    lines = [*study.table("test", ANSWER_LENGTH), ""]
    if arguments.long_problems:
        lines += [*study.table("long", LONG_ANSWER_LENGTH), ""]
    lines += ["False acceptances / false rejections on held-out passes, in %, by threshold:", ""]
    thresholds = CANDIDATES["learned_filter"]
    lines += [f"| | {' | '.join(map(str, thresholds))} |", "| --- " * (len(thresholds) + 1) + "|"]
    for label, rates in study.results["rates"].items():
        cells = [f"{100 * rate['false_accept']:.1f} / {100 * rate['false_reject']:.1f}" for rate in rates]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    (arguments.output_dir / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(
        f"In {arguments.output_dir}: report.md, results.json and the filters. Next, to save one of them with a model: "
        "model.set_unmasking_filter(UnmaskingFilter.from_pretrained(FOLDER)); model.save_pretrained(...)"
    )


if __name__ == "__main__":
    main()
