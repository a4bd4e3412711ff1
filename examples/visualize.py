"""Show how answers come about: a page that plays the decoding pass by pass, and a picture for a README.

Without `--model` the two example models of this repository decode: the teacher one token a pass and by a threshold,
and its distilled student. The page opens finished; with `#play` behind its address it plays by itself. The picture
needs matplotlib (`pip install ".[eval]"`); without it, there is the page alone.

    python examples/visualize.py
    python examples/visualize.py --model user/repo --prompt "What is 17 * 23?" --output decoding.html \\
        --decoding unmasking=confidence_threshold,threshold=0.9 --decoding '{"unmasking": "margin", "steps": 64}'
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent / "word_problems"))
from problems import NUM_TEST_PROBLEMS, TEST_SEED, generate_problems
from quickstart import ANSWER_LENGTH, MODELS, own_decoding

import dparallel.modeling  # registers the models: official repositories' own code is older  # noqa: F401
from dparallel.hub_cards.command_line import CommandParser, plain_errors
from dparallel.hub_cards.hub_ids import check_folder_or_hub_id

TEMPLATE = Path(__file__).with_suffix(".html")
DEFAULT_DECODING = {"unmasking": "confidence_threshold", "threshold": 0.9}
ONE_TOKEN = {"unmasking": "confidence", "steps": ANSWER_LENGTH}
DECODINGS = {"teacher": [ONE_TOKEN, DEFAULT_DECODING], "student": [{}]}
DEFAULT_BLOCK_LENGTH = 32
# From the first pass to the last: lightness alone tells the order. From probability 0 to 1: what is unsure stands out.
PASS_COLOURS = ["#fbe38e", "#abd98a", "#6cc4a4", "#6cb4da", "#37589f", "#3d2f73"]
CERTAINTY_COLOURS = ["#a61c3c", "#e2604a", "#f5a878", "#f3dcc4", "#d6e4f0"]
CERTAINTY_DARK = ["#ff5c72", "#f58a5f", "#d9a066", "#7d7068", "#3a597d"]
PICTURE_WIDTH, MARGIN, ROW_HEIGHT = 9.0, 0.08, 0.26  # of the picture, in inches
TOKEN_SIZE, LONGEST_TEXT = 9, 40  # of a token in the picture, in points and in characters
WHITESPACE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


# --- traces ----------------------------------------------------------------------------------------------------------


def split_text(tokenizer, ids):
    """The text that each of these tokens adds; joined, they are the decoded answer. Where a character is spread over
    tokens, the last of them has it."""
    texts, text = [], ""
    for i in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:i], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if longer.endswith("\ufffd") and i < len(ids):
            longer = text
        texts.append(longer[len(text) :])
        text = longer
    return texts


def visible_mark(tokenizer, token_id, text):
    """What stands for the part of a token that cannot be seen, empty if there is none."""
    if token_id in tokenizer.all_special_ids:
        return tokenizer.convert_ids_to_tokens(token_id)
    if not text:
        return "…"  # a part of a character
    unseen = [char for char in text if not char.isprintable() or text.isspace()]
    return "".join(WHITESPACE.get(char, "␣" if char.isspace() else f"U+{ord(char):04X}") for char in unseen)


def trace(output, row, tokenizer, prompt_width, model="model", decoding=None, block_length=DEFAULT_BLOCK_LENGTH):
    """One row of a `DiffusionGenerationOutput` as plain numbers and texts.

    `prompt_width` is the length of the (padded) prompts, `decoding` the settings to show. A pass counts from 1, and is
    0 for positions that were never written. Tokens behind the end-of-text have no text.
    """
    if getattr(output, "unmasking_step", None) is None:
        raise ValueError(
            "`output` has no `unmasking_step`: it must come from `generate(..., return_dict_in_generate=True)` of a "
            "diffusion model."
        )
    ids, length = output.sequences[row, prompt_width:].tolist(), output.num_tokens[row].item()
    if len(ids) != output.unmasking_step.shape[1]:
        raise ValueError(
            f"`prompt_width={prompt_width!r}` leaves {len(ids)} tokens of {output.sequences.shape[1]}, but the answer "
            f"has {output.unmasking_step.shape[1]}."
        )
    texts = split_text(tokenizer, ids[:length])
    marks = [visible_mark(tokenizer, token_id, text) for token_id, text in zip(ids, texts, strict=False)]
    padding = [""] * (len(ids) - length)
    tokens = zip(
        ids, texts + padding, marks + padding, output.unmasking_step[row].tolist(),
        output.unmasking_confidence[row].tolist(), strict=True,
    )  # fmt: skip
    settings = dict(decoding or {})
    name = settings.pop("unmasking", None)
    return {
        "model": str(model),
        "decoding": ", ".join([*([name] if name else []), *(f"{key} {value}" for key, value in settings.items())]),
        "block_length": block_length,
        "passes": output.num_forward_passes[row].item(),
        "length": length,
        "tokens_per_pass": round(output.tokens_per_forward[row].item(), 2),
        "tokens": [
            {"id": token_id, "text": text, "mark": mark, "pass": step + 1, "probability": round(probability, 4)}
            for token_id, text, mark, step, probability in tokens
        ],
    }


def pass_ticks(last):
    """Passes to name on a logarithmic scale: 1, 2, 4, ... and the last one."""
    ticks = [2**i for i in range(last.bit_length())]
    return [tick for tick in ticks if tick <= last / 1.4 or tick == 1] + ([last] if last > 1 else [])


# --- page and picture ------------------------------------------------------------------------------------------------


def to_html(traces, prompt):
    """The page, complete in itself."""
    last = max(each["passes"] for each in traces)
    data = {
        "prompt": prompt, "last": last, "ticks": pass_ticks(last), "pass_colours": PASS_COLOURS,
        "certainty_colours": CERTAINTY_COLOURS, "certainty_dark": CERTAINTY_DARK, "traces": traces,
    }  # fmt: skip
    # A token may be </script> or <!--: in JSON, "<" only stands inside strings, where it can be written so.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("TRACES", text, 1)


def to_picture(traces, path):
    """A PNG with the tokens of each trace, coloured by the pass that wrote them and wrapped as text is."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.figure import Figure  # not pyplot, which may look for a display

    figure = Figure(figsize=(PICTURE_WIDTH, 1), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # its coordinates are inches, from the upper left corner
    axes.set_axis_off()
    last = max(each["passes"] for each in traces)
    colours, norm = LinearSegmentedColormap.from_list("passes", PASS_COLOURS), LogNorm(1, max(last, 2))
    top = MARGIN
    for each in traces:
        top = _draw_heading(axes, each, top)
        cells, height = _wrap(_cells_of(axes, each), PICTURE_WIDTH - 2 * MARGIN)
        for cell, left, row in cells:
            _draw_cell(axes, cell, MARGIN + left, top + row * ROW_HEIGHT, lambda number: colours(norm(number)))
        top += height * ROW_HEIGHT + 0.2
    _draw_scale(axes, top, colours, norm, last)
    height = top + 0.5
    figure.set_size_inches(PICTURE_WIDTH, height)
    axes.set(xlim=(0, PICTURE_WIDTH), ylim=(height, 0))
    figure.savefig(path)


def _cells_of(axes, each):
    """A cell for each position up to the last that was written: its text, width, the gap before it, its pass, and
    whether it is the first of a block. Positions behind the end-of-text are narrow and have no text."""
    count = max((i for i, token in enumerate(each["tokens"], start=1) if token["pass"]), default=0)
    cells = []
    for i, token in enumerate(each["tokens"][:count]):
        text, is_first = token["text"].strip() + token["mark"], i > 0 and i % each["block_length"] == 0
        text = text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
        gap = 0.15 if is_first else 0.09 if token["text"][:1].isspace() else 0.02
        width = 0.09
        if text:
            probe = axes.text(0, 0, text, fontsize=TOKEN_SIZE, parse_math=False)
            width = 0.07 + probe.get_window_extent().width / axes.figure.dpi
            probe.remove()
        cells.append({"text": text, "width": width, "gap": gap, "pass": token["pass"], "is_first": is_first})
    return cells


def _wrap(cells, width):
    """Each cell with its place in a line, and its line; and the number of lines."""
    placed, right, row = [], 0.0, 0
    for cell in cells:
        left = right + cell["gap"] if right else 0.0
        if left + cell["width"] > width:
            left, row = 0.0, row + 1
        placed.append((cell, left, row))
        right = left + cell["width"]
    return placed, row + 1


def _draw_heading(axes, each, top):
    """Model, decoding and what it took; returns where the tokens begin."""
    label = f"{Path(each['model']).name}, {each['decoding']}"
    size = 10 * min(1, 64 / len(label))  # leaves room for the numbers
    style = {"va": "center", "parse_math": False}
    axes.text(MARGIN, top + 0.1, label, fontsize=size, **style)
    passes = f"{each['passes']} forward pass{'es' if each['passes'] != 1 else ''}"
    numbers = f"{passes}, {each['tokens_per_pass']:.1f} tokens per pass"
    axes.text(PICTURE_WIDTH - MARGIN, top + 0.1, numbers, fontsize=10, fontweight="bold", ha="right", **style)
    return top + 0.29


def _draw_cell(axes, cell, left, top, colour_of):
    from matplotlib.patches import Rectangle

    height = ROW_HEIGHT - 0.05
    colour = colour_of(cell["pass"])[:3] if cell["pass"] else (0.94, 0.94, 0.94)
    axes.add_patch(Rectangle((left, top), cell["width"], height, facecolor=colour, linewidth=0))
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour)
    ink = "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"
    place = left + cell["width"] / 2, top + 0.48 * height
    axes.text(
        *place, cell["text"], fontsize=TOKEN_SIZE, color=ink, ha="center", va="center_baseline", parse_math=False
    )
    if cell["is_first"]:
        axes.vlines(left - 0.06, top - 0.02, top + height + 0.02, colors="0.4", linewidth=1, linestyles="dotted")


def _draw_scale(axes, top, colours, norm, last):
    """What the colours say, below the traces."""
    text = axes.text(MARGIN, top + 0.1, "written in pass", fontsize=9, va="center")
    left, width = MARGIN + text.get_window_extent().width / axes.figure.dpi + 0.1, 3.0
    steps = [[i / 256 for i in range(256)]]
    axes.imshow(steps, cmap=colours, aspect="auto", extent=(left, left + width, top + 0.17, top + 0.03))
    for tick in pass_ticks(last):
        axes.text(left + width * float(norm(tick)), top + 0.28, tick, fontsize=8, ha="center", va="center")
    note = "dotted line: next block; narrow: padding behind the end-of-text"
    axes.text(PICTURE_WIDTH - MARGIN, top + 0.1, note, fontsize=8, color="0.35", ha="right", va="center")


# --- command ---------------------------------------------------------------------------------------------------------


def parse_decoding(text):
    """Settings of `generate()`, from JSON or from `name=value,name=value`."""

    def parse_value(value):
        try:
            return json.loads(value.lower())  # lower: True as in Python
        except ValueError:
            return value

    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        return {name.strip(): parse_value(value) for name, value in (pair.split("=", 1) for pair in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be JSON or unmasking=...,threshold=...") from None


def decode(model, tokenizer, prompt, decoding):
    """The output for one prompt, as a chat where the tokenizer knows chats, and the prompt's length in tokens."""
    if tokenizer.chat_template is None:
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
    output = model.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **decoding)
    return output, ids.shape[1]


def main():
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--model",
        action="append",
        help="Hub id or folder of a model; may be given several times (default: the two example models)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the Python code of these models")
    parser.add_argument(
        "--decoding", action="append", type=parse_decoding, metavar="SETTINGS",
        help="arguments of generate(), as JSON or as unmasking=...,threshold=...; may be given several times "
        "(default: the model's own)",
    )  # fmt: skip
    parser.add_argument("--prompt", help="question that the models answer (default: a held-out word problem)")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of an answer at most (default: the model's own)")
    parser.add_argument("--output", type=Path, default=Path("decoding.html"), help="file of the page")
    parser.add_argument(
        "--picture", type=Path, help="file of the picture, if matplotlib is installed (default: beside the page)"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, or a device's name such as cuda:1")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="data type of the weights")
    arguments = parser.parse_args()
    arguments.picture = arguments.picture or arguments.output.with_suffix(".png")
    if arguments.picture == arguments.output:
        parser.error(f"--output {arguments.output}: it must be another file than the picture")
    try:
        torch.empty(0, device=arguments.device)
    except (AssertionError, RuntimeError) as error:
        parser.error(f"--device {arguments.device}: {error}")
    if arguments.prompt is None:
        arguments.prompt = next(iter(generate_problems("test", NUM_TEST_PROBLEMS, TEST_SEED))).question
    if not arguments.prompt.strip():
        parser.error(f"--prompt {arguments.prompt!r}: it must not be empty")
    for name in ("output", "picture"):
        path = getattr(arguments, name)
        if not path.parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.parent}")

    models = {path: path for path in arguments.model} if arguments.model else MODELS
    trusted = {
        "trust_remote_code": arguments.trust_remote_code or not arguments.model
    }  # the example models have our own
    decodings = dict.fromkeys(models, arguments.decoding or [{}])
    if not arguments.model and not arguments.decoding:
        decodings = DECODINGS
    length = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    traces = []
    for name, path in models.items():
        with plain_errors(ValueError, OSError):
            check_folder_or_hub_id("model", path)
            tokenizer = AutoTokenizer.from_pretrained(path, **trusted)
            model = AutoModelForCausalLM.from_pretrained(path, **trusted, dtype=arguments.dtype)
        model = model.to(arguments.device).eval()
        own = own_decoding(model) or DEFAULT_DECODING
        for given in decodings[name]:
            decoding = given if "unmasking" in given else {**own, **given}
            try:
                output, width = decode(model, tokenizer, arguments.prompt, length | decoding)
            except ValueError as error:
                sys.exit(f"{name}, {decoding}: {error}")
            saved = getattr(model.generation_config, "block_length", None)
            block_length = decoding.get("block_length") or saved or DEFAULT_BLOCK_LENGTH
            traces.append(trace(output, 0, tokenizer, width, name, decoding, block_length))
            column = traces[-1]
            print(f"{name}, {column['decoding']}: {column['length']} tokens in {column['passes']} forward passes")
    arguments.output.write_text(to_html(traces, arguments.prompt), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("There is no picture, as matplotlib is not installed.")
        print(f"In {arguments.output}: the page. Next: open it in a browser.")
        return
    to_picture(traces, arguments.picture)
    print(
        f"In {arguments.output} and {arguments.picture}: the page and the picture. Next: open the page in a browser."
    )


if __name__ == "__main__":
    main()
