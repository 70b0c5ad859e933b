"""docs/errors.md and its pages: every program runs, and prints what its page says that it prints.

The programs run in one process of their own, because some of them change global switches.
Run: pytest tests/long/test_errors_page.py
"""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import torch

ROOT = tiny.ROOT
INDEX = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("errors_*.md"))}
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
SECTIONS = {title: body for page in PAGES.values() for title, body in SECTION.findall(page)}
PROGRAMS = {title: body for title, body in SECTIONS.items() if "```python" in body}
WORDED_LIKE_THIS = torch.torch_version.TorchVersion("2.14")  # the version whose words the page quotes
RUNNER = """
import contextlib, io, json, sys, traceback, warnings

results = []
for program in json.load(sys.stdin):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = ""
        try:
            exec(compile(program, "program", "exec"), {"__name__": "program"})
        except Exception as failure:
            error = "".join(traceback.format_exception_only(failure))
    said = [f"{warning.category.__name__}: {warning.message}" for warning in caught]
    results.append({"warnings": said, "printed": output.getvalue(), "error": error})
json.dump(results, sys.stdout)
"""


def blocks(body):
    """Return the section's programs, each with its documented output lines."""
    found = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", body, re.DOTALL)
    return [(program, expected.splitlines()) for program, expected in found]


@pytest.fixture(scope="module")
def results():
    """Run the programs; return {title: [result of the first program, of the second ...]}."""
    programs = [(title, program) for title, body in PROGRAMS.items() for program, _ in blocks(body)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([program for _, program in programs]),
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    found = {}
    for (title, _), result in zip(programs, json.loads(process.stdout), strict=True):
        found.setdefault(title, []).append(result)
    return found


def kind(line):
    """`RuntimeError: what it says` -> `RuntimeError:`; other lines as they are."""
    return re.sub(r"^(\w+(?:Error|Warning):) .*", r"\1", line)


@pytest.mark.parametrize("title", PROGRAMS)
def test_the_program_says_what_the_page_says(title, results):
    for (_, expected), result in zip(blocks(PROGRAMS[title]), results[title], strict=True):
        said = "\n".join([*result["warnings"], result["printed"], result["error"]])
        for line in expected:
            words = line if torch.__version__ >= WORDED_LIKE_THIS else kind(line)
            assert words in said, said


@pytest.mark.parametrize("title", PROGRAMS)
def test_the_cure_cures(title, results):
    """The first program shows the trouble; the others run without it."""
    (_, trouble), *_ = blocks(PROGRAMS[title])
    for cure in results[title][1:]:
        assert cure["error"] == ""
        said = "\n".join([*cure["warnings"], cure["printed"]])
        assert not [line for line in trouble if line in said.splitlines()], said
        assert not [line for line in trouble if "Warning:" in line and line in said], said


def test_the_pages_have_twenty_sections_and_the_index_lists_them_all():
    assert len(PROGRAMS) >= 20
    for name, page in PAGES.items():
        for title in dict(SECTION.findall(page)).keys() & PROGRAMS.keys():
            anchor = re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")
            assert f"]({name}#{anchor})" in INDEX, title


@pytest.mark.parametrize("title", PROGRAMS)
def test_each_section_has_a_cause_a_cure_and_a_way_on(title):
    body = PROGRAMS[title]
    assert "**Cause.**" in body and "**Cure.**" in body
    assert re.search(r"^(Recipes?|More): \[", body, re.MULTILINE)
