"""The picture of decoding: its data, the picture, and the page in a real browser."""

import json
import os
import select
import shutil
import subprocess
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dparallel.modeling import DiffusionGenerationOutput
from tests import scripts
from tests.golden import STUDENT

visualize = scripts.load("visualize.py")
parse_decoding, pass_ticks, split_text = visualize.parse_decoding, visualize.pass_ticks, visualize.split_text
to_html, to_picture, trace = visualize.to_html, visualize.to_picture, visualize.trace
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
END = 0  # end-of-text of the word tokenizer


def make_output(tokenizer, text, steps, padding=0):
    """Two rows: one of nothing but end-of-text, and `text`, its tokens and the end-of-text written in these passes.
    What is behind it never is. The prompts have two tokens, and all probabilities are 0.125."""
    ids = [*tokenizer(text).input_ids, END]
    steps = torch.tensor([*steps, *[-1] * padding])
    passes = steps.max().item() + 1
    return DiffusionGenerationOutput(
        sequences=torch.tensor([[7, 8] + [END] * (len(ids) + padding), [7, 8] + ids + [END] * padding]),
        num_forward_passes=torch.tensor([1, passes]),
        tokens_per_forward=torch.tensor([1.0, len(ids) / passes]),
        unmasking_step=torch.stack((torch.zeros_like(steps), steps)),
        unmasking_confidence=torch.full((2, len(steps)), 0.125),
    )


# --- data and picture ------------------------------------------------------------------------------------------------


def test_trace(word_tokenizer):
    output = make_output(word_tokenizer, "26 beads.", [1, 0, 1, 2, 4], padding=2)
    got = trace(output, 1, word_tokenizer, 2, "student", {"unmasking": "entropy_threshold", "threshold": 0.1}, 4)
    tokens = [
        ("2", "", 2),
        ("6", "", 1),
        (" beads", "", 2),
        (".", "", 3),
        ("", "<|endoftext|>", 5),
        *[("", "", 0)] * 2,
    ]
    assert got.pop("tokens") == [
        {"id": token_id, "text": text, "mark": mark, "pass": number, "probability": 0.125}
        for token_id, (text, mark, number) in zip(output.sequences[1, 2:].tolist(), tokens, strict=True)
    ]
    assert got == {
        "model": "student", "decoding": "entropy_threshold, threshold 0.1", "block_length": 4, "passes": 5,
        "length": 5, "tokens_per_pass": 1.0,
    }  # fmt: skip
    first = trace(output, 0, word_tokenizer, 2)
    assert first["length"] == 1 and [token["pass"] for token in first["tokens"]] == [1] * 7


def test_trace_of_a_model(word_model, word_tokenizer):
    chats = [[{"role": "user", "content": text}] for text in ("Sam has 3 nuts. Sam buys 4 more.", "Ann has 17 pens.")]
    inputs = word_tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    output = word_model.generate(**inputs, max_new_tokens=48, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    for row in range(2):
        got = trace(output, row, word_tokenizer, width)
        assert [token["pass"] - 1 for token in got["tokens"]] == output.unmasking_step[row].tolist()
        answer = word_tokenizer.decode(output.sequences[row, width:], skip_special_tokens=True)
        assert "".join(token["text"] for token in got["tokens"]) == answer


@pytest.mark.parametrize("text", ["26 beads", " a\n\n\tb", "日本語 £", "<|user|> is special", "\u200b\r\n  ", ""])
def test_texts_join_to_the_answer(text, word_tokenizer):
    ids = word_tokenizer(text).input_ids
    texts = split_text(word_tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == word_tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" not in "".join(texts)


def test_what_cannot_be_seen_is_marked(word_tokenizer):
    output = make_output(word_tokenizer, "日\n\t \u200b.", range(11))
    found = [(token["text"], token["mark"]) for token in trace(output, 1, word_tokenizer, 2)["tokens"]]
    assert found == [
        ("", "…"), ("", "…"), ("日", ""), ("\n", "↵"), ("\t", "⇥"), (" ", "␣"), ("", "…"), ("", "…"),
        ("\u200b", "U+200B"), (".", ""), ("", "<|endoftext|>"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("last", "ticks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (9, [1, 2, 4, 9]), (64, [1, 2, 4, 8, 16, 32, 64])]
)
def test_ticks(last, ticks):
    assert pass_ticks(last) == ticks


def test_data_cannot_end_the_script(word_tokenizer):
    text = 'a</script><!-- TRACES "\\ \u2028'
    output = make_output(word_tokenizer, text, [0] * (len(word_tokenizer(text).input_ids) + 1))
    traces = [trace(output, 1, word_tokenizer, 2, model="<b>")]
    page = to_html(traces, "</script>")
    assert page.count("</script>") == 2 and page.count("<!--") == 1, "the template's own"
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["prompt"] == "</script>" and data["traces"] == traces


def test_picture(tmp_path, word_tokenizer):
    output = make_output(word_tokenizer, "26 beads.", [1, 0, 1, 2, 4], padding=40)
    traces = [trace(output, row, word_tokenizer, 2, block_length=3) for row in (1, 0, 1)]
    sizes = []
    for number in (1, 3):
        to_picture(traces[:number], tmp_path / "picture.png")
        picture = Image.open(tmp_path / "picture.png").convert("RGB")
        assert picture.getpixel((0, 0)) == (255, 255, 255) and len(picture.getcolors(1 << 20)) > 50
        sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] == 1800 and sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize(
    "text",
    ["26 beads.", "We take 40 and get 60 - 40 = 20. " * 6, "$5 _{ and $6^ \\frac", "a\n\n\tb", "x" * 300, ""],
    ids=["short", "lines", "formula", "whitespace", "long word", "empty"],
)
@pytest.mark.parametrize("block_length", [4, 32])
def test_tokens_are_in_the_cells(text, block_length, tmp_path, word_tokenizer, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    count = len(word_tokenizer(text).input_ids) + 1
    output = make_output(word_tokenizer, text, range(count), padding=3)
    got = trace(output, 1, word_tokenizer, 2, block_length=block_length)
    to_picture([got], tmp_path / "picture.png")
    (axes,) = figures[0].axes
    figures[0].draw_without_rendering()
    cells = [patch.get_bbox() for patch in axes.patches]
    texts = axes.texts[2 : 2 + count]  # behind those of the heading
    assert [text.get_text() for text in texts] == [
        token["text"].strip() + token["mark"] for token in got["tokens"][:-3]
    ]
    assert len(cells) == count and len(axes.collections) == (count - 1) // block_length, "a line before each block"
    for text, cell in zip(texts, cells, strict=True):
        extent = text.get_window_extent().transformed(axes.transData.inverted())
        assert cell.x0 < extent.x0 and extent.x1 < cell.x1 and 0 <= cell.x0 and cell.x1 <= 9, "within its cell"
    for one, other in pairwise(cells):  # from left to right and from line to line
        assert (one.x1 < other.x0 and one.y0 == other.y0) or (
            other.x0 < one.x0 + 1e-6 and other.y0 > max(one.y0, one.y1)
        )


def test_the_script_makes_page_and_picture(tmp_path):
    result = scripts.call("visualize.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "teacher, confidence, steps 128: 59 tokens in 64 forward passes",
        "teacher, confidence_threshold, threshold 0.9: 59 tokens in 22 forward passes",
        "student, entropy_threshold, threshold 0.1: 60 tokens in 6 forward passes",
        "In decoding.html and decoding.png: the page and the picture. Next: open the page in a browser.",
    ]
    assert {each.name for each in tmp_path.iterdir()} == {"decoding.html", "decoding.png"}


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_trace_says_what_is_wrong(word_tokenizer):
    with pytest.raises(ValueError, match="`output` has no `unmasking_step`"):
        trace(SimpleNamespace(sequences=torch.zeros(1, 3)), 0, word_tokenizer, 1)
    with pytest.raises(ValueError, match="`prompt_width=3` leaves 1 tokens of 4, but the answer has 2"):
        trace(make_output(word_tokenizer, "2", [0, 0]), 1, word_tokenizer, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unmasking=margin,steps=64", {"unmasking": "margin", "steps": 64}),
        ("threshold=0.5, stop_at_eos=False", {"threshold": 0.5, "stop_at_eos": False}),
        ('{"unmasking": "entropy_bound", "threshold": 1e-3}', {"unmasking": "entropy_bound", "threshold": 1e-3}),
    ],
)
def test_decodings_are_read(text, expected):
    assert parse_decoding(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "--prompt ' ': it must not be empty"),
        (["--output", "nowhere/page.html"], "--output nowhere/page.html: there is no folder nowhere"),
        (["--picture", "nowhere/page.png"], "--picture nowhere/page.png: there is no folder nowhere"),
        (["--picture", "decoding.html"], "--output decoding.html: it must be another file than the picture"),
        (["--device", "abacus"], "--device abacus: Expected one of cpu, cuda"),
        (["--decoding", "margin"], "argument --decoding: 'margin' must be JSON or unmasking=...,threshold=..."),
        (["--decoding", "{1}"], "argument --decoding: '{1}' must be JSON"),
        (["--decoding", "unmasking=best"], "`unmasking='best'` is not allowed"),
    ],
)
def test_the_script_says_what_is_wrong(arguments, message, tmp_path):
    result = scripts.call("visualize.py", *arguments, cwd=tmp_path)
    assert result.returncode and message in result.stderr and not list(tmp_path.iterdir())


# --- the page --------------------------------------------------------------------------------------------------------


class Browser:
    """A Chromium without a window, driven by its DevTools protocol through a pair of pipes."""

    def __init__(self, program, profile):
        there, self.requests = os.pipe()
        self.replies, back = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(  # it reads from descriptor 3 and writes to 4
            ["bash", "-c", f'exec "$0" "$@" 3<&{there} 4>&{back}', program, *flags], pass_fds=(there, back),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(there)
        os.close(back)
        self.unread, self.number, self.session, self.complaints = b"", 0, {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def wait_for(self, is_it, seconds=120):
        deadline = time.monotonic() + seconds
        while True:
            while b"\0" not in self.unread:
                ready = select.select([self.replies], [], [], max(deadline - time.monotonic(), 0))[0]
                data = os.read(self.replies, 1 << 20) if ready else b""
                assert data, "the browser is gone" if ready else "the browser does not answer"
                self.unread += data
            text, self.unread = self.unread.split(b"\0", 1)
            message = json.loads(text)
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.complaints.append(message["params"])
            if is_it(message):
                return message

    def send(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.requests, json.dumps(request).encode() + b"\0")
        reply = self.wait_for(lambda message: message.get("id") == self.number)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, path, fragment=""):
        self.complaints.clear()
        self.send("Page.navigate", url="about:blank")  # else, with another fragment, the page is not loaded again
        self.send("Page.navigate", url=path.as_uri() + fragment)
        # Not the event that says so, which may have come before the reply.
        loaded = "new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))"
        self.run(f"{loaded}.then(() => null)")

    def run(self, script):
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def expect(self, script, value, seconds=60):
        """Wait until a script has this value: what a key does may come after the browser's reply."""
        deadline = time.monotonic() + seconds
        while (found := self.run(script)) != value and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found == value

    def press(self, key, code=0):
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def prefer(self, scheme):
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        # The page hears of it with a frame.
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(null))))")

    def close(self):
        self.session = {}
        os.write(self.requests, b'{"id": 0, "method": "Browser.close"}\0')
        self.process.wait(timeout=120)
        os.close(self.requests)
        os.close(self.replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


ANSWERS = "[...document.querySelectorAll('.answer')].map((each) => each.innerText)"
WRITTEN = "[...document.querySelectorAll('.panel')].map((each) => each.querySelectorAll('.written').length)"
NOW = "[...document.querySelectorAll('.panel')].map((each) => each.querySelectorAll('.now').length)"
COLOURS = "[...document.querySelectorAll('.panel .token')].map((each) => getComputedStyle(each).backgroundColor)"
HEADLINE = "['headline', 'between'].map((id) => document.getElementById(id).innerText)"
STATUS = "[...document.querySelectorAll('.status')].map((each) => each.innerText)"


def move_to(browser, position):
    browser.run(f"slider.value = {position}; slider.dispatchEvent(new Event('input'))")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the script makes without arguments."""
    folder = tmp_path_factory.mktemp("decoded")
    assert scripts.call("visualize.py", cwd=folder).returncode == 0
    return folder / "decoding.html"


def test_page_plays_the_decoding(browser, page):
    browser.prefer("light")
    browser.open(page)
    traces = browser.run("data.traces")
    answers = ["".join(token["text"] for token in each["tokens"]) for each in traces]
    assert all("The answer is 20." in answer for answer in answers)
    assert browser.run("[slider.value, slider.max, play.textContent]") == ["64", "64", "Play"], "it opens finished"
    assert browser.run(ANSWERS) == answers
    for position in (0, 3, 6, 22, 40, 64):
        move_to(browser, position)
        steps = [[token["pass"] - 1 for token in each["tokens"]] for each in traces]
        assert browser.run(WRITTEN) == [sum(0 <= step < position for step in row) for row in steps]
        assert browser.run(NOW) == [sum(step == position - 1 >= 0 for step in row) for row in steps]
        visible = browser.run(ANSWERS)
        for text, answer, status, each in zip(visible, answers, browser.run(STATUS), traces, strict=True):
            assert position or not text.strip(), "all masked"
            is_done = position >= each["passes"]
            assert (text == answer) == is_done == (status == f"done after pass {each['passes']}")
    assert browser.run(HEADLINE) == [
        "64 → 6 passes", "teacher, confidence, steps 128 → student, entropy_threshold, threshold 0.1"
    ]  # fmt: skip
    heads = browser.run("[...document.querySelectorAll('.numbers')].map((each) => each.innerText)")
    assert heads[2] == "forward passes 6, tokens per pass 10.0"
    assert browser.run("slider.getAttribute('aria-valuetext')") == "after pass 64 of 64"
    assert browser.run("document.querySelectorAll('.answer .first').length") == 3, "a border of blocks in each"
    assert "64 positions never written" in browser.run("document.querySelector('.tail').innerText")
    assert browser.complaints == []


def test_page_colours(browser, page):
    browser.prefer("light")
    browser.open(page)
    move_to(browser, 64)
    seen = []
    for colour in ("pass", "certainty"):
        browser.run(f"document.querySelector('[value={colour}]').click()")
        seen.append(browser.run(f"[{COLOURS}, document.getElementById('key').innerText]"))
    assert seen[0][1].split("\n\n")[:2] == ["pass in which a token was written", "1\n2\n4\n8\n16\n32\n64"]
    assert seen[1][1].split("\n\n")[:2] == ["probability of a token when it was written", "0\n0.25\n0.5\n0.75\n1"]
    assert all(one != other for one, other in zip(seen[0][0], seen[1][0], strict=True))
    tokens = [token for each in browser.run("data.traces") for token in each["tokens"] if token["pass"]]
    first = [colour for colour, token in zip(seen[0][0], tokens, strict=True) if token["pass"] == 1]
    assert set(first) == {"rgb(251, 227, 142)"}, "passes have the same colour in all panels"
    # WCAG 2.2 asks for a contrast of 4.5 between a text and what is behind it.
    contrast = """(colour) => {
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = colour.match(/\\d+/g).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    }"""
    worst = f"""Math.min(...[...document.querySelectorAll('.answer .written')].map((each) => {{
        const style = getComputedStyle(each), light = [style.color, style.backgroundColor].map({contrast});
        return Math.max(...light) / Math.min(...light);
    }}))"""
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for colour in ("pass", "certainty"):
            browser.run(f"document.querySelector('[value={colour}]').click()")
            assert browser.run(worst) >= 4.5
    body = "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    assert browser.run(body) == ["rgb(17, 20, 26)", "rgb(231, 234, 240)"], "dark"
    browser.prefer("light")
    assert browser.run(body) == ["rgb(246, 247, 249)", "rgb(28, 34, 48)"]
    assert browser.complaints == []


def test_page_by_keyboard(browser, page):
    browser.prefer("light")
    browser.open(page)
    focus = "document.activeElement"
    browser.run("slider.focus()")
    browser.press("Home", 36)
    browser.expect(f"[slider.value, {NOW}[0]]", ["0", 0])
    browser.press("ArrowRight", 39)
    browser.expect(f"[slider.value, {NOW}[0]]", ["1", 1])
    browser.press("End", 35)
    browser.expect("slider.value", "64")
    for _ in range(2):  # the radio buttons, the first panel
        browser.press("Tab", 9)
    browser.expect(f"{focus}.innerText", "We")
    browser.press("ArrowRight", 39)
    token = browser.run("data.traces[0].tokens[1]")
    tip = '" start"\npass {pass} of 64\nprobability {probability:.4f}\ntoken id {id}\nposition 2, block 1'
    browser.expect("tip.innerText", tip.format(**token))
    assert browser.run(f"{focus}.getAttribute('aria-describedby')") == "tip"
    browser.press("Escape", 27)
    browser.expect(f"[tip.hidden, {focus}.innerText]", [True, "start"])
    browser.press("Tab", 9)  # one stop in each panel
    browser.expect(f"cells.get({focus})?.trace === data.traces[1]", True)
    move_to(browser, 0)
    browser.press("End", 35)  # nothing is told before its pass
    browser.expect("tip.innerText", "masked\nposition 64, block 2")
    assert browser.complaints == []


def test_page_plays(browser, tmp_path, word_tokenizer):
    output = make_output(word_tokenizer, "26 beads.", [1, 0, 1, 2, 4])
    page = tmp_path / "page.html"
    page.write_text(to_html([trace(output, 1, word_tokenizer, 2)], "How many?"), encoding="utf-8")
    # Ten times faster, and each position that is shown is written down, from the page's first moment on.
    script = """
        const interval = setInterval, seen = [];
        setInterval = (f, ms) => interval(f, ms / 10);
        new MutationObserver(() => seen.push(slider.value)).observe(
            document, { attributes: true, attributeFilter: ["aria-valuetext"], subtree: true });
    """
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source=script)
    state = "[play.textContent, slider.value, seen.join('')]"
    browser.open(page)
    browser.expect(state, ["Play", "5", "5"])
    assert browser.run("play.click(); play.textContent") == "Pause"
    browser.expect(state, ["Play", "5", "5012345"])
    browser.run("play.click()")
    browser.expect(state, ["Play", "5", "5012345012345"])
    assert browser.run("play.click(); play.click(); [play.textContent, slider.value]") == ["Play", "0"]
    browser.open(page, "#play")
    browser.expect(state, ["Play", "5", "012345"])
    browser.open(page, "#prompt")
    browser.expect(state, ["Play", "5", "5"])
    browser.run("location.hash = '#play'")
    browser.expect(state, ["Play", "5", "5012345"])
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
    assert browser.complaints == []


@pytest.mark.parametrize(
    ("passes", "headline"),
    [
        ([5], "5 passes"), ([1], "1 pass"), ([4, 4], "4 passes"), ([9, 1], "9 → 1 pass"), ([2, 7, 3], "7 → 2 passes"),
        ([1, 1], "1 pass"),
    ],
)  # fmt: skip
def test_headline(browser, passes, headline, tmp_path, word_tokenizer):
    """The most and the fewest passes, and whose they are; of one model its own number alone."""
    outputs = [make_output(word_tokenizer, "26 beads.", [0, 0, 0, 0, count - 1]) for count in passes]
    traces = [trace(output, 1, word_tokenizer, 2, model=f"m{i}") for i, output in enumerate(outputs)]
    traces = [each | {"decoding": "fast"} for each in traces]
    (tmp_path / "page.html").write_text(to_html(traces, "How many?"), encoding="utf-8")
    browser.open(tmp_path / "page.html")
    ends = [f"m{passes.index(end(passes))}, fast" for end in (max, min)]
    assert browser.run(HEADLINE) == [headline, " → ".join(ends) if "→" in headline else ""]
    size = "parseFloat(getComputedStyle(document.querySelector('{}')).fontSize)"
    assert browser.run(size.format("#headline")) > 2 * browser.run(size.format("body"))


def test_masked_looks_like_no_colour(browser, page):
    """Hatched, which no written token is: neither without colours nor in the dark is it taken for a sure one."""
    browser.open(page)
    look = """[true, false].map((written) => [...document.querySelectorAll('.panel .token')]
        .filter((each) => each.classList.contains('written') === written)
        .map((each) => getComputedStyle(each).backgroundImage.replace(/\\(.*/, '')))"""
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for colour in ("pass", "certainty"):
            browser.run(f"document.querySelector('[value={colour}]').click()")
            for position in (0, 5, 64):
                move_to(browser, position)
                written, masked = browser.run(look)
                assert len(written) == sum(browser.run(WRITTEN)) and len(written) + len(masked) == 192
                assert set(written) <= {"none"} and set(masked) <= {"repeating-linear-gradient"}
    browser.prefer("light")
    assert browser.complaints == []


def test_page_takes_any_token(browser, tmp_path, word_tokenizer):
    text = "</script><img src=x onerror=alert(1)> &lt;<!-- \n\n\t日本  £\u200b$&"
    steps = range(len(word_tokenizer(text).input_ids) + 1)
    output = make_output(word_tokenizer, text, steps, padding=3)
    page = tmp_path / "page.html"
    page.write_text(to_html([trace(output, 1, word_tokenizer, 2, model="<i>m</i>")], "<b>?</b>"), encoding="utf-8")
    browser.open(page)
    assert browser.run("document.querySelectorAll('img, i, b:not(.numbers b)').length") == 0
    heads = browser.run("['#prompt', 'h2'].map((each) => document.querySelector(each).innerText)")
    assert heads == ["<b>?</b>", "<i>m</i>"]
    assert browser.run(ANSWERS) == [text]
    move_to(browser, 0)
    assert not browser.run(ANSWERS)[0].strip()
    move_to(browser, len(steps))
    marks = browser.run("[...document.querySelectorAll('[data-mark]')].map((each) => each.dataset.mark)")
    assert {"↵", "⇥", "…", "U+200B", "<|endoftext|>"} <= set(marks)
    assert "3 positions never written" in browser.run("document.querySelector('.tail').innerText")
    assert browser.complaints == []


def test_page_of_one_model_on_a_phone(browser, tmp_path):
    flags = ["--model", STUDENT, "--prompt", "Sam has 3 nuts. Sam buys 4 more. How many nuts does Sam have now?"]
    flags += ["--decoding", "unmasking=confidence,stop_at_eos=False,block_length=16", "--decoding", "threshold=0.3"]
    flags += ["--max-new-tokens", 40, "--output", "page.html"]
    assert scripts.call("visualize.py", *flags, cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.png"]
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    browser.open(tmp_path / "page.html")
    assert browser.run("[...document.querySelectorAll('.decoding')].map((each) => each.innerText)") == [
        "confidence, stop_at_eos False, block_length 16", "entropy_threshold, threshold 0.3"
    ]  # fmt: skip
    assert browser.run("document.querySelector('.panel').querySelectorAll('.first').length") == 2
    move_to(browser, 40)
    assert browser.run(WRITTEN)[0] == 40
    assert browser.run("document.documentElement.scrollWidth") <= 360, "nothing to scroll sideways"
    assert browser.run("document.getElementById('controls').offsetHeight") <= 740 / 5, "room for the answers below"
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert browser.complaints == []
