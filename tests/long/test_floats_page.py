"""docs/floats.html in a headless browser: its arithmetic against torch's, what its controls do, colours, widths.

The page is loaded once, with a script behind its own that plays with it and leaves JSON.
Skipped if there is no Chromium. Run: pytest tests/long/test_floats_page.py
"""

import html
import json
import re
import shutil
import subprocess
from collections import Counter

import pytest
import tiny
import torch

PAGE = tiny.ROOT / "docs/floats.html"
TEXT = PAGE.read_text(encoding="utf-8")
DTYPES = {
    "FP32": torch.float32,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHIFTS = (0, 8, 16, 30)
PLAY = """
const found = {errors: []};
const pick = name => document.querySelector(`input[value=${name}]`).click();
const preset = name => [...byId("presets").children].find(button => button.textContent === name).click();
const type = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
const shares = () => Object.fromEntries([...byId("shares").querySelectorAll("[data-share]")].map(
  line => [line.dataset.share, line.textContent.split(": ")[1]]));
const buttons = () => [...byId("bits").querySelectorAll("button")];
async function give(name, text) {
  const files = new DataTransfer();
  files.items.add(new File([text], name));
  byId("file").files = files.files;
  byId("file").dispatchEvent(new Event("change"));
  await new Promise(done => setTimeout(done, 100));
}
async function sticksOut(width) {
  const frame = make("iframe", {width, height: 800, srcdoc: GIVEN.text});
  document.body.append(frame);
  await new Promise(done => frame.addEventListener("load", done));
  const inner = frame.contentDocument;
  return Object.keys(FORMATS).filter(name => {
    inner.querySelector(`input[value=${name}]`).click();
    return inner.documentElement.scrollWidth > width;
  });
}
const nameOf = field => field.getAttribute("aria-label") || field.labels?.[0]?.textContent
  || byId(field.getAttribute("aria-labelledby"))?.textContent || field.textContent;
async function play() {
  found.names = [...document.querySelectorAll("button, input, select, [role=region], section")].map(nameOf);
  found.rounded = Object.fromEntries(Object.keys(FORMATS).map(
    name => [name, GIVEN.values.map(value => written(rounded(name, value)))]));
  found.decoded = Object.fromEntries(Object.entries(GIVEN.patterns).map(
    ([name, patterns]) => [name, patterns.map(bits => written(decode(FORMATS[name], bits)))]));
  pick("FP16"); preset("one");
  found.one = buttons().map(button => button.getAttribute("aria-pressed"));
  buttons()[0].click();
  found.flipped = [byId("value").textContent, buttons()[0].getAttribute("aria-label")];
  buttons()[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  found.focused = buttons().indexOf(document.activeElement);
  preset("largest");
  found.largest = byId("value").textContent;
  pick("E4M3");
  found.nearest = [byId("value").textContent, buttons().length];
  type("number", "70000");
  found.became = Object.fromEntries([...byId("became").rows].map(
    row => [row.cells[0].textContent, [...row.cells].map(cell => cell.textContent)]));
  type("number", "seven");
  found.seven = [byId("number-error").textContent, byId("became").rows.length, byId("number").ariaInvalid];
  found.before = shares();
  await give("notes.json", "[]");
  found.refused = byId("file-error").textContent;
  await give("inspect.json", GIVEN.inspected);
  found.source = byId("source").textContent;
  found.shares = {};
  for (const name of ["FP16", "BF16", "E5M2"]) for (const shift of GIVEN.shifts) {
    type("kind", name); type("scale", shift);
    found.shares[`${name} ${shift}`] = shares();
  }
  found.slider = byId("scale").getAttribute("aria-valuetext");
  found.sticksOut = [await sticksOut(360), await sticksOut(1200)];
}
window.addEventListener("error", event => found.errors.push(event.message));
play().catch(error => found.errors.push(String(error))).then(
  () => document.body.replaceChildren(make("pre", {id: "found", textContent: JSON.stringify(found)})));
"""


def some_values():
    """Return float32 numbers of every size, with ties and borders of every format among them."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3000, generator=generator) * torch.exp2(torch.randint(-150, 128, (3000,), generator=generator))
    patterns = torch.arange(0, 2**16, 97, dtype=torch.int32).to(torch.uint16)
    halves = torch.cat([patterns.view(torch.float16).float(), patterns.view(torch.bfloat16).float()])
    neighbours = torch.cat([torch.nextafter(halves, torch.tensor(way)) for way in (float("inf"), -float("inf"))])
    ties = torch.tensor(
        [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 3 * 2**-25, 65519, 65520, 464, 465]
    )
    eights = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (eights[:-1] + eights[1:]) / 2
    values = torch.cat([random, halves, neighbours, ties, -ties, middles, torch.tensor([0.0, -0.0])])
    return values[values.isfinite()]


def gradients():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20_000, generator=generator) * torch.exp2(torch.randn(20_000, generator=generator) * 6 - 22)


PATTERNS = {"E4M3": range(256), "E5M2": range(256), "FP16": range(0, 2**16, 7), "BF16": range(0, 2**16, 7)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what the script found on the page."""
    if not BROWSER:
        pytest.skip("no Chromium")
    exponents = Counter((torch.frexp(gradients()).exponent - 1).tolist())
    given = {
        "text": TEXT,
        "values": some_values().double().tolist(),
        "patterns": {name: list(patterns) for name, patterns in PATTERNS.items()},
        "inspected": json.dumps({"underflow": {"histogram": {"activation": exponents, "parameter": exponents}}}),
        "shifts": SHIFTS,
    }
    script = f"const GIVEN = {json.dumps(given)};\n{PLAY}".replace("</", "<\\/")
    file = tmp_path_factory.mktemp("page") / "floats.html"
    file.write_text(TEXT.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--virtual-time-budget=9000",
    ]
    done = subprocess.run([BROWSER, *options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL).group(1)))


def assert_same(texts, theirs):
    """Compare numbers, zeros by their signs too; NaN equals NaN."""
    ours = torch.tensor([float(text.replace("infinity", "inf")) for text in texts], dtype=torch.float64)
    theirs = theirs.double()
    equal = (ours == theirs) & (ours.signbit() == theirs.signbit())
    assert bool((equal | (ours.isnan() & theirs.isnan())).all())


def test_numbers_are_rounded_and_patterns_read_as_torch_does(found):
    values = some_values()
    for name, dtype in DTYPES.items():
        theirs = values.to(dtype).float()
        if name == "E4M3":  # versions before 2.14 turn what is too large into NaN
            theirs = torch.where(theirs.isnan(), values.sign() * 448, theirs)
        assert_same(found["rounded"][name], theirs)
    bits = values.view(torch.int32)  # TF32 keeps ten bits of the fraction
    kept = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)
    normal = (values.abs() > torch.finfo(torch.float32).tiny).tolist()
    texts = [text for text, take in zip(found["rounded"]["TF32"], normal, strict=True) if take]
    assert_same(texts, kept[torch.tensor(normal)])
    for name, patterns in PATTERNS.items():
        unsigned = torch.uint8 if len(patterns) == 256 else torch.uint16
        assert_same(found["decoded"][name], torch.tensor(patterns).to(unsigned).view(DTYPES[name]).float())


def test_bits_are_flipped_and_a_change_of_format_keeps_the_number(found):
    assert len(found["one"]) == 16 and found["one"].count("true") == 4
    value, label = found["flipped"]
    assert value.startswith("-1") and label == "sign: 1" and found["focused"] == 1
    assert found["largest"].startswith("65504")
    assert found["nearest"][0].startswith("448") and found["nearest"][1] == 8


def test_a_typed_number_is_shown_in_every_format(found):
    rows = found["became"]
    assert rows["FP16"][1] == "infinity" and rows["FP16"][2].startswith("overflow")
    assert rows["BF16"][1:4] == ["70144", "rounded", "0.21 %"] and rows["FP32"][1:4] == ["70000", "exact", "0"]
    assert rows["E4M3"][1] == "448"
    said, rows, invalid = found["seven"]
    assert "not a number" in said and rows == 0 and invalid == "true"


def test_the_shares_are_those_of_a_real_cast(found):
    """Of a histogram of known gradients, loaded as users load theirs."""
    values = gradients()
    for name in ("FP16", "BF16", "E5M2"):
        limits = torch.finfo(DTYPES[name])
        for shift in SHIFTS:
            cast = (values * 2.0**shift).to(DTYPES[name]).float().abs()
            truth = {"zero": cast == 0, "subnormal": (cast > 0) & (cast < limits.tiny), "overflow": cast > limits.max}
            shown = found["shares"][f"{name} {shift}"]
            for kind, which in truth.items():
                said = 0.0 if shown[kind].startswith("below") else float(shown[kind].removesuffix(" %")) / 100
                coarse = 0.02 if name == "E5M2" else 0.002  # at borders
                assert abs(said - which.float().mean().item()) < coarse, (name, shift, kind)
    assert found["source"] == "inspect.json" and found["slider"] == "2 to the power of 30"
    assert "notes.json is not an inspect.json" in found["refused"] and found["before"] != found["shares"]["FP16 0"]


def test_everything_has_a_name_nothing_sticks_out_and_no_script_fails(found):
    assert len(found["names"]) > 20 and all(name.strip() for name in found["names"])
    assert found["sticksOut"] == [[], []] and found["errors"] == []


def luminance(color):
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_in_both_schemes():
    """4.5 to 1, as WCAG 2 asks of text."""
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", TEXT, re.DOTALL)
    ]
    assert [luminance(colors["paper"]) > 0.5 for colors in schemes] == [True, False] and "scheme: dark" in TEXT
    for colors in schemes:
        for name in ("ink", "soft", "sign", "exponent", "fraction", "zero", "subnormal", "overflow", "kept"):
            light, dark = sorted([luminance(colors[name]), luminance(colors["paper"])], reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_the_page_needs_no_network_and_its_histogram_is_a_real_one():
    addresses = set(re.findall(r"https?://[^\s\"')]+", TEXT)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set() and "import " not in TEXT and "<script src" not in TEXT
    content = json.loads(re.search(r"histogram begins \*/ (.*?) /\* histogram ends", TEXT).group(1))
    for group in ("activation", "parameter"):
        assert sum(content[group].values()) > 100_000
    assert "python main.py" in content["source"]
