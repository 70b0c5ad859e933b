"""docs/floats.html in a headless browser: its arithmetic against torch's, its keys, its colours, its widths.

Skipped if there is no selenium or no Chromium with its driver. Run: pytest tests/long/test_floats_page.py
"""

import json
import re
import shutil
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
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_window_size(1200, 900)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser):
    browser.get(PAGE.as_uri())
    return browser


def element(page, name):
    return page.find_element("id", name)


def as_float(text):
    return float(text.replace("infinity", "inf"))


def same(ours, theirs):
    """Equal numbers, zeros by their signs too; NaN equals NaN."""
    ours = torch.tensor(ours, dtype=torch.float64)
    theirs = theirs.double()
    equal = (ours == theirs) & (ours.signbit() == theirs.signbit())
    return bool((equal | (ours.isnan() & theirs.isnan())).all())


def some_values():
    """float32 numbers of every size, ties and borders of every format among them."""
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


@pytest.mark.parametrize("name", DTYPES)
def test_numbers_are_rounded_as_torch_rounds_them(page, name):
    values = some_values()
    script = "return arguments[1].map(value => written(rounded(arguments[0], value)));"
    ours = [as_float(text) for text in page.execute_script(script, name, values.double().tolist())]
    theirs = values.to(DTYPES[name]).float()
    if name == "E4M3":  # versions before 2.14 turn what is too large into NaN
        theirs = torch.where(theirs.isnan(), values.sign() * 448, theirs)
    assert same(ours, theirs)


def test_tf32_keeps_ten_bits_of_the_fraction(page):
    values = some_values()
    values = values[values.abs() > torch.finfo(torch.float32).tiny]
    bits = values.view(torch.int32)
    kept = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    script = "return arguments[0].map(value => written(rounded('TF32', value)));"
    assert same(
        [as_float(text) for text in page.execute_script(script, values.double().tolist())], kept.view(torch.float32)
    )


@pytest.mark.parametrize(("name", "whole", "step"), [("E4M3", 8, 1), ("E5M2", 8, 1), ("FP16", 16, 7), ("BF16", 16, 7)])
def test_every_pattern_means_what_torch_says(page, name, whole, step):
    patterns = list(range(0, 2**whole, step))
    script = "return arguments[1].map(bits => written(decode(FORMATS[arguments[0]], bits)));"
    ours = [as_float(text) for text in page.execute_script(script, name, patterns)]
    unsigned = torch.uint8 if whole == 8 else torch.uint16
    assert same(ours, torch.tensor(patterns).to(unsigned).view(DTYPES[name]).float())


def test_bits_are_flipped_with_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("css selector", "input[value=FP16]").click()
    page.find_element("xpath", "//button[text()='one']").click()
    buttons = page.find_elements("css selector", "#bits button")
    assert len(buttons) == 16 and [button.get_attribute("aria-pressed") for button in buttons].count("true") == 4
    buttons[0].send_keys(Keys.SPACE)
    assert element(page, "value").text.startswith("-1\n")
    assert buttons[0].get_attribute("aria-label") == "sign: 1"
    buttons[0].send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element == buttons[1]
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert (
        element(page, "value").text.startswith("-infinity")
        or "65536" in element(page, "value").text
        or "NaN" in element(page, "value").text
    )


def test_the_format_is_changed_with_the_keyboard_and_keeps_the_number(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("css selector", "input[value=FP16]").click()
    page.find_element("xpath", "//button[text()='largest']").click()
    assert element(page, "value").text.startswith("65504")
    page.find_element("css selector", "input[value=FP16]").send_keys(Keys.ARROW_RIGHT)
    assert element(page, "value").text.startswith("448\n")  # E4M3's nearest
    assert len(page.find_elements("css selector", "#bits button")) == 8


def test_a_typed_number(page):
    field = element(page, "number")
    field.clear()
    field.send_keys("70000")
    rows = {row.split()[0]: row for row in element(page, "became").text.splitlines()}
    assert "infinity" in rows["FP16"] and "overflow" in rows["FP16"]
    assert rows["BF16"].startswith("BF16 70144 rounded 0.21 %") and rows["FP32"].startswith("FP32 70000 exact 0 ")
    assert rows["E4M3"].startswith("E4M3 448 ")
    field.clear()
    field.send_keys("seven")
    assert "not a number" in element(page, "number-error").text and element(page, "became").text == ""
    assert field.get_attribute("aria-invalid") == "true"


def shares_on(page):
    lines = page.find_elements("css selector", "#shares [data-share]")
    return {line.get_attribute("data-share"): line.text.split(": ")[1] for line in lines}


@pytest.mark.parametrize("name", ["FP16", "BF16", "E5M2"])
def test_the_shares_are_those_of_a_real_cast(page, tmp_path, name):
    """A histogram of known gradients, loaded as a user loads his own."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20_000, generator=generator) * torch.exp2(torch.randn(20_000, generator=generator) * 6 - 22)
    exponents = Counter((torch.frexp(values).exponent - 1).tolist())
    file = tmp_path / "inspect.json"
    file.write_text(json.dumps({"underflow": {"histogram": {"activation": exponents, "parameter": exponents}}}))
    element(page, "file").send_keys(str(file))
    page.find_element("css selector", f"#kind option[value={name}]").click()
    limits = torch.finfo(DTYPES[name])
    for shift in (0, 8, 16, 30):
        page.execute_script(
            "const slider = document.getElementById('scale'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'));",
            shift,
        )
        cast = (values * 2.0**shift).to(DTYPES[name]).float().abs()
        truth = {"zero": cast == 0, "subnormal": (cast > 0) & (cast < limits.tiny), "overflow": cast > limits.max}
        shown = shares_on(page)
        for kind, which in truth.items():
            share = which.float().mean().item()
            said = 0.0 if shown[kind].startswith("below") else float(shown[kind].removesuffix(" %")) / 100
            assert abs(said - share) < (0.02 if name == "E5M2" else 0.002), (name, shift, kind)  # coarse at borders
    assert element(page, "source").text == "inspect.json"


def test_the_slider_moves_with_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    before = shares_on(page)
    element(page, "scale").send_keys(Keys.END)
    after = shares_on(page)
    assert before != after and float(after["overflow"].removesuffix(" %")) > 0
    assert element(page, "scale").get_attribute("aria-valuetext") == "2 to the power of 32"


def test_a_wrong_file_is_refused_in_words(page, tmp_path):
    file = tmp_path / "notes.json"
    file.write_text("[]")
    element(page, "file").send_keys(str(file))
    page.implicitly_wait(2)
    assert "notes.json is not an inspect.json" in page.find_element("xpath", "//p[@id='file-error' and text()]").text


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out(page, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    for name in DTYPES:
        page.find_element("css selector", f"input[value={name}]").click()
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(color):
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_in_both_schemes(page, scheme):
    """4.5 to 1, as WCAG 2 asks of text."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    script = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim();"
    paper = luminance(page.execute_script(script, "--paper"))
    assert (paper > 0.5) == (scheme == "light")
    for name in ("ink", "soft", "sign", "exponent", "fraction", "zero", "subnormal", "overflow", "kept"):
        light, dark = sorted([luminance(page.execute_script(script, f"--{name}")), paper], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_everything_has_a_name_and_the_log_is_clean(page):
    fields = page.find_elements("css selector", "button, input, select, [role=region], section")
    assert len(fields) > 20 and all(field.accessible_name for field in fields)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_page_needs_no_network():
    addresses = set(re.findall(r"https?://[^\s\"')]+", TEXT)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set() and "import " not in TEXT and "<script src" not in TEXT


def test_the_histogram_is_a_real_one():
    content = json.loads(re.search(r"histogram begins \*/ (.*?) /\* histogram ends", TEXT).group(1))
    for group in ("activation", "parameter"):
        assert sum(content[group].values()) > 100_000
    assert "python main.py" in content["source"]
