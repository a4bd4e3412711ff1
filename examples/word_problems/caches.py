"""What each block cache and each way of refreshing it costs in accuracy, and saves in time, on word problems.

The two example models, a teacher and its distilled student, decode in bfloat16 on a GPU, all 128 tokens unless an
answer ends before. A block-causal model, whose cache is exact, stands beside them if there is one: what
`train.py --block_causal true` makes. Prints a table and writes JSON. The 5,000 held-out problems are for a GPU, 16 for
a try on a CPU.

    python examples/word_problems/caches.py --block_causal runs/block_causal
    python examples/word_problems/caches.py --problems 16
"""

import json
from itertools import islice
from pathlib import Path

import torch
from problems import NUM_TEST_PROBLEMS, TEST_SEED, generate_problems
from solving import ANSWER_LENGTH, evaluate, load_model
from transformers import AutoTokenizer

from dparallel.hub_cards import here_and_now
from dparallel.hub_cards.command_line import CommandParser
from dparallel.hub_cards.measurements import paired_difference

HERE = Path(__file__).parent
MODELS = {"teacher": HERE / "checkpoint", "student": HERE / "student"}
DECODINGS = {
    "teacher": {"unmasking": "confidence_threshold", "threshold": 0.95},
    "student": {"unmasking": "entropy_threshold", "threshold": 0.1},
    "block-causal": {"unmasking": "confidence_threshold", "threshold": 0.95},
    "block-causal, one token a pass": {"unmasking": "confidence", "steps": ANSWER_LENGTH},
}
CACHES = {
    "none": {},
    "prefix": {"block_cache": "prefix"},
    "prefix, every 4 passes": {"block_cache": "prefix", "cache_refresh_interval": 4},
    "prefix, previous block": {"block_cache": "prefix", "cache_refresh": "previous_block"},
    "dual": {"block_cache": "dual"},
    "dual, every 4 passes": {"block_cache": "dual", "cache_refresh_interval": 4},
    "dual, every pass": {"block_cache": "dual", "cache_refresh_interval": 1},
    "dual, previous block": {"block_cache": "dual", "cache_refresh": "previous_block"},
}
EXACT = {"none": {"block_cache": "none"}, "exact": {"block_cache": "exact"}}


def main():
    parser = CommandParser(__doc__)
    parser.add_argument("--problems", type=int, default=NUM_TEST_PROBLEMS, help="number of problems, from 2 to 5000")
    parser.add_argument(
        "--batch_size",
        type=int,
        help="number of problems that are solved at a time (default: 512 on a GPU, 8 on a CPU)",
    )
    parser.add_argument("--block_causal", type=Path, help="folder of a block-causal model (default: none is measured)")
    parser.add_argument("--output", type=Path, default=Path("caches.json"), help="file for every row of the table")
    arguments = parser.parse_args()
    if not 2 <= arguments.problems <= NUM_TEST_PROBLEMS:
        parser.error(f"--problems {arguments.problems}: it must be from 2 to {NUM_TEST_PROBLEMS}")
    is_gpu = torch.cuda.is_available()
    batch_size = arguments.batch_size or (512 if is_gpu else 8)
    problems = list(islice(generate_problems("test", NUM_TEST_PROBLEMS, TEST_SEED), arguments.problems))
    results = {**here_and_now(), "problems": len(problems), "batch_size": batch_size, "rows": []}
    print(f"{len(problems)} problems, batch size {batch_size}, {', '.join(here_and_now().values())}\n")
    print("| model | cache, refreshed | NFE | seconds | accuracy % | against none, in points (95% interval, paired) |")
    print("| --- " * 6 + "|", flush=True)
    for name, decoding in DECODINGS.items():
        path = MODELS.get(name, arguments.block_causal)
        if path is None:
            continue
        model = load_model(path)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        exact = None
        for cache, settings in (CACHES if name in MODELS else EXACT).items():
            evaluate(model, tokenizer, problems[:batch_size], "warm-up", batch_size, **decoding, **settings)
            result = evaluate(model, tokenizer, problems, cache, batch_size, **decoding, **settings)
            exact = result if exact is None else exact
            difference = "" if result is exact else str(paired_difference(result.correct, exact.correct))
            row = {"model": name, "cache": cache, "decoding": decoding | settings, "difference": difference}
            row |= {key: getattr(result, key) for key in ("nfe", "tpf", "seconds", "accuracy")}
            results["rows"].append(row)
            print(
                f"| {name} | {cache} | {result.nfe:.1f} | {result.seconds:.1f} | {100 * result.accuracy:.1f} | "
                f"{difference} |",
                flush=True,
            )
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"In {arguments.output}: every row. Next, for a large model's speed: python examples/benchmarks/decoding.py")


if __name__ == "__main__":
    main()
