"""How long decoding takes: `generate()` with each cache, beside a plain loop and beside what the hardware allows.

Every row is one way of decoding `--length` tokens in blocks of 32 with a fixed number of passes (`unmasking=
"confidence"`, `steps`), so that random weights take as many as trained ones. The plain loop is what research code
does, with the same weights and in the same run: the head on the whole sequence, softmax in float64, tokens written one
by one from the host. Floors come from the bandwidth and the matrix rate that are measured first. On a GPU, the
captured steps are also timed alone: the longest is a pass over the whole canvas, the shortest one over what the cache
leaves; what they do not explain of the time of `generate()` is the host's. Prints a table and writes JSON.

The first command needs a GPU of 80 GB, for LLaDA-8B's shape with random weights; the second, with the small example
model `examples/word_problems/checkpoint`, takes two minutes on a CPU.

    python examples/benchmarks/decoding.py
    python examples/benchmarks/decoding.py --shape example
"""

import itertools
import json
import time
from collections import Counter
from pathlib import Path

import torch

from dparallel.hub_cards import here_and_now
from dparallel.hub_cards.command_line import CommandParser
from dparallel.modeling import LLaDAConfig, LLaDAModelLM
from dparallel.modeling.captured_step import captured_steps

EXAMPLE = Path(__file__).parents[1] / "word_problems" / "checkpoint"
BLOCK_LENGTH = 32
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def seconds(function, device, repeats):
    """Of one call: the fastest of some, after one that does not count. What takes long is called less often, and after
    a minute not again."""
    times = []
    while len(times) <= repeats and sum(times) < 60:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def measure_ceilings(device):
    """Bytes per second that are read, and operations per second of a large matrix product."""
    size, count = (8192, 2**30) if device == "cuda" else (1024, 2**26)
    matrix = torch.randn(size, size, device=device, dtype=DTYPES[device])
    numbers = torch.ones(count, device=device, dtype=DTYPES[device])
    reading = seconds(numbers.max, device, 5)
    product = seconds(lambda: matrix @ matrix, device, 5)
    return {"bytes_per_second": numbers.nbytes / reading, "operations_per_second": 2 * size**3 / product}


def floor(model, ceilings, batch_size, positions, seen):
    """Seconds that a pass over `positions` of each row takes at least, if they attend to `seen`: all weights are read
    once, or all products are made at the measured rate, whichever takes longer."""
    config = model.config
    head = model.get_output_embeddings().weight
    weights = sum(parameter.numel() for parameter in model.parameters()) - head.numel()  # embeddings are looked up
    weights -= 0 if config.weight_tying else model.get_input_embeddings().weight.numel()
    rows = batch_size * positions
    operations = 2 * rows * weights + 2 * batch_size * BLOCK_LENGTH * head.numel()
    operations += 4 * rows * seen * config.d_model * config.n_layers
    read = (weights + head.numel()) * head.element_size()
    return max(read / ceilings["bytes_per_second"], operations / ceilings["operations_per_second"])


def floor_of_all(model, ceilings, batch_size, prompt_length, length, passes, cache, refresh):
    """The same for a whole answer: the sum over its passes."""
    blocks, total = length // BLOCK_LENGTH, 0.0
    for block in range(blocks):
        behind = length - block * BLOCK_LENGTH
        usual = {"none": prompt_length + length, "prefix": behind}.get(cache, BLOCK_LENGTH)
        first = seen = prompt_length + length
        if cache == "exact":  # nothing behind the block is seen
            first = seen = prompt_length + (block + 1) * BLOCK_LENGTH
        if (refresh == "previous_block" or cache == "exact") and block > 0:
            first = usual + BLOCK_LENGTH
        for positions in (first, *[usual] * (passes // blocks - 1)):
            total += floor(model, ceilings, batch_size, positions, seen)
    return total


@torch.no_grad()
def plain_loop(model, prompts, length, passes):
    """Low-confidence remasking as research code writes it."""
    mask, start = model.config.mask_token_id, prompts.shape[1]
    canvas = torch.cat((prompts, prompts.new_full((len(prompts), length), mask)), dim=1)
    blocks = length // BLOCK_LENGTH
    for block in range(blocks):
        stop = start + (block + 1) * BLOCK_LENGTH
        for i in range(passes // blocks):
            logits = model(canvas).logits
            masked = canvas == mask
            tokens = logits.argmax(dim=-1)
            confidence = logits.double().softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
            confidence[:, stop:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            for row in range(len(canvas)):
                left = int(masked[row, :stop].sum())
                count = left // (passes // blocks - i)
                for position in confidence[row].topk(count).indices:
                    canvas[row, position] = tokens[row, position]
    return canvas


def time_steps(model, decode):
    """Replay each captured step of a decoding alone. Returns seconds of each kind, the longest first, and of all steps
    that the decoding makes."""
    steps, counts, plans = captured_steps(model), Counter(), {}
    run = steps.run

    def count(canvas, key, step):
        counts[key] += 1
        plans[key] = canvas.numbers.clone()
        run(canvas, key, step)

    steps.run = count
    decode()
    del steps.run
    canvas, taken = next(reversed(steps.canvases.values())), {}
    for key in counts:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        canvas.numbers.copy_(plans[key])
        canvas.graphs[key].replay()
        begin.record()
        for _ in range(5):
            canvas.graphs[key].replay()
        end.record()
        torch.cuda.synchronize()
        taken[key] = begin.elapsed_time(end) / 5000
    return sorted(taken.values(), reverse=True), sum(taken[key] * number for key, number in counts.items())


def add_shape_argument(parser):
    """What `load` loads."""
    parser.add_argument(
        "--shape",
        default="llada_8b",
        choices=["llada_8b", "example"],
        help="llada_8b: the shape of LLaDA-8B with random weights; example: the example model of word problems",
    )


def load(shape, device):
    if shape == "example":
        return LLaDAModelLM.from_pretrained(EXAMPLE, dtype=DTYPES[device]).to(device).eval()
    with torch.device(device):
        torch.manual_seed(0)
        default, _ = torch.get_default_dtype(), torch.set_default_dtype(DTYPES[device])
        model = LLaDAModelLM(LLaDAConfig()).eval()
        torch.set_default_dtype(default)
    return model


def main():
    parser = CommandParser(__doc__)
    add_shape_argument(parser)
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        help="numbers of prompts in a batch (default: 1 4 8 32, with --shape example 1 8)",
    )
    parser.add_argument(
        "--prompt_lengths",
        type=int,
        nargs="+",
        help="tokens of a prompt (default: 128 1024 3072, with --shape example 64)",
    )
    parser.add_argument(
        "--passes", type=int, nargs="+", help="passes that an answer takes (default: 32 256, with --shape example 16)"
    )
    parser.add_argument("--length", type=int, help="tokens of an answer (default: 256, with --shape example 128)")
    caches = ["none", "prefix", "dual", "dual,previous_block", "exact"]
    caches_help = "values of `block_cache`, each alone or with a comma and a value of `cache_refresh`; exact: with "
    caches_help += "attention that is causal between blocks"
    parser.add_argument("--caches", nargs="+", default=caches, help=caches_help)
    parser.add_argument("--repeats", type=int, default=3, help="calls that are timed, of which the fastest counts")
    parser.add_argument("--no_plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--output", type=Path, default=Path("decoding.json"), help="file for every row of the table")
    arguments = parser.parse_args()
    is_example = arguments.shape == "example"
    batch_sizes = arguments.batch_sizes or ([1, 8] if is_example else [1, 4, 8, 32])
    prompt_lengths = arguments.prompt_lengths or ([64] if is_example else [128, 1024, 3072])
    all_passes = arguments.passes or ([16] if is_example else [32, 256])
    length = arguments.length or (128 if is_example else 256)
    for passes in all_passes:
        if passes % (length // BLOCK_LENGTH) or length % BLOCK_LENGTH:
            parser.error(f"--passes {passes} --length {length}: blocks of {BLOCK_LENGTH} must share both evenly")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceilings = measure_ceilings(device)
    model = load(arguments.shape, device)
    results = here_and_now() | {"threads": torch.get_num_threads(), "shape": arguments.shape}
    results |= {"ceilings": ceilings, "length": length, "rows": []}
    print(f"{results['hardware']}, {results['threads']} threads, {results['versions']}, {results['date']}")
    print(f"read {ceilings['bytes_per_second'] / 1e12:.3g} TB/s, ", end="")
    print(f"matrix products {ceilings['operations_per_second'] / 1e12:.3g} TFLOP/s, {arguments.shape}, G {length}\n")
    columns = (
        "batch | prompt | NFE | decoding | ms per NFE | floor | steps alone | host | tokens/s | times the plain loop"
    )
    print(f"| {columns} | GiB |")
    print("| --- " * 11 + "|", flush=True)
    decodings = [] if arguments.no_plain else ["plain loop"]
    for prompt_length, batch_size, passes in itertools.product(prompt_lengths, batch_sizes, all_passes):
        prompts = torch.randint(5, model.config.vocab_size // 2, (batch_size, prompt_length), device=device)
        plain = None
        for decoding in [*decodings, *arguments.caches]:
            cache, _, refresh = decoding.partition(",")
            model.config.block_causal_length = BLOCK_LENGTH if cache == "exact" else None
            if decoding == "plain loop":
                cache = "none"

                def decode(prompts=prompts, passes=passes):
                    return plain_loop(model, prompts, length, passes)

            else:
                settings = {"block_cache": cache, "cache_refresh": refresh or None, "steps": passes}

                def decode(prompts=prompts, settings=settings):
                    return model.generate(
                        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length,
                        block_length=BLOCK_LENGTH, unmasking="confidence", stop_at_eos=False, **settings,
                    )  # fmt: skip

            row = {"batch": batch_size, "prompt": prompt_length, "passes": passes, "decoding": decoding}
            least = floor_of_all(model, ceilings, batch_size, prompt_length, length, passes, cache, refresh)
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                taken = seconds(decode, device, arguments.repeats)
            except torch.OutOfMemoryError:
                results["rows"].append({**row, "seconds": None})
                print(f"| {batch_size} | {prompt_length} | {passes} | {decoding} | out of memory |||||||", flush=True)
                continue
            plain = taken if decoding == "plain loop" else plain
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            row |= {"seconds": taken, "floor": least, "plain": plain, "gibibytes": memory}
            alone = host = ""
            if device == "cuda" and decoding != "plain loop":
                row["steps"], total = time_steps(model, decode)
                row["host"] = 1 - total / taken
                alone, host = " ".join(f"{1000 * step:.2f}" for step in row["steps"]), f"{100 * row['host']:.0f}%"
            results["rows"].append(row)
            print(
                f"| {batch_size} | {prompt_length} | {passes} | {decoding} | {1000 * taken / passes:.2f} | "
                f"{1000 * least / passes:.2f} | {alone} | {host} | {batch_size * length / taken:.0f} | "
                f"{'' if plain is None else f'{plain / taken:.1f}'} | {'' if memory is None else f'{memory:.1f}'} |",
                flush=True,
            )
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"In {arguments.output}: every row. Next, for the speed of training: python examples/benchmarks/training.py")


if __name__ == "__main__":
    main()
