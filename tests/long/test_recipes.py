"""Runs every recipe as a reader would, and looks for the numbers that make its point.

The recipes assert their own claims; this checks that they run, that they print, and that the index is whole.
It must not import a recipe: each is a program that stands alone. Run: pytest tests/long/test_recipes.py
"""

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import tiny
import torch
from forks import Process

FOLDER = tiny.ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))

# Patterns that must be found in the output, so that a recipe cannot lose its failure and keep its rule.
TELLING = {
    "01_typical_step": [
        r"4194304  skipped",
        r"float32 0%, float16 [3-9]\d%",
        r"moved by 0\.000; in the next",
        r"Attempting to unscale FP16 gradients",
    ],
    "02_clipping": [r"norm 65536 times too large", r"clip too early +\d{5}\.", r"unscale_\(\) has already been called"],
    "03_accumulation": [
        r"float16, parts of 8 8 8 4 .* error +0\.\d\d%",
        r"no division .* error +3\d\d\.\d\d%",
        r"scale changed .* error +2\d\.\d\d%",
        r"unscale_\(\) has already been called",
    ],
    "04_gradient_penalty": [r"left scaled: 65536 times", r"65536 skipped", r"skipped updates: 0 and [1-9]"],
    "05_several_models_losses_optimizers": [
        r"update\(\) last +0\.00000 +0\.\d+ +4096 -> 2048",
        r"2\.00 times too long",
    ],
    "06_data_parallel": [
        r"plain threads +\['float32'\]",
        r"handed to the threads +\['bfloat16'\]",
        r"with its dtype +\['float16'\]",
    ],
    "07_distributed_data_parallel": [
        r"\n +2 .*4096 skip.*nan +4096 skip",
        r"\n +3 .* 2048 .* 2048 ",
        r"\n +2 .*4096 +nan +nan +4096 skip",
    ],
    "08_custom_autograd_function": [
        r"expected m1 and m2 to have the same dtype",
        r"naked +inf float16",
        r"7024\d\.\d float32, gradient float16",
    ],
    "09_save_and_resume": [
        r"difference 0\.0\n",
        r"difference 0\.0[1-9]\d*\n",
        r"2097152, after: 1048576",
        r"RuntimeError: The source state dict is empty",
    ],
    "10_without_a_scaler": [r"float16, no scaler +100\.0%", r"float16 \+ scaler +0\.0%", r"exactly zero +100\.0%"],
    "11_bfloat16_against_float16": [r"70000 becomes +70000 +70144 +inf", r"3000 +256 +2048", r"76800 +76800 +inf"],
    "12_autocast_op_lists": [
        r"convolution +float16 -> float16",
        r"_log_softmax +float32 -> float32",
        r"linear +bfloat16 +bfloat16 +runs in 16 bits",
        r"out=c\): float32",
    ],
    "13_inference": [r"float32 +\d\d\.\d\d% +0\.00000 +0\n", r"bfloat16 .* [1-9]\d*\n", r"0\.0% in eval\(\), [1-9]"],
    "14_compile": [
        r"bfloat16 compiled, same_as_forward .* 100\.0%  0\.[1-9]",
        r"float16 +compiled, off .* [0-4]\.\d%  0\.00%",
    ],
    "15_find_the_overflow": [
        r"loud network 0\.0625",
        r"pool +largest +inf +<- not finite",
        r"not finite: forward, pool",
        r"not finite: backward, head",
        r"not finite: none",
    ],
    "16_weight_cache": [
        r"\n  3 with gradients +1\n",
        r"cache_enabled=False +3\n",
        r"(YES|no): the weight got (no|its) gradient",
        r"without gradient: 0\.weight, 2\.weight",
    ],
    "17_nan_gradient_finite_loss": [
        r"float16 +loss 0\.2\d+, 0 of 4",
        r"float16( +finite){4}( +NaN){2}\n",
        r"scale 1024 -> 0\.25",
        r"'MulBackward0' returned nan",
        r"in float32 +loss .* scale 1024\n",
    ],
    "18_clipping_with_a_fused_optimizer": [
        r"foreach, hook clips +0\.7144",
        r"fused, hook clips +46822",
        r"fused +step\(\) called 2 times, Adam counts 1",
        r"RuntimeError: The total norm",
    ],
    "19_bfloat16_products_in_float32": [
        r"inside float32: 257 +autocast: 256",
        r"this device (obeys|ignores)",
        r'"tf32" on a CPU is accepted and changes nothing: error \d\.\de-07',
        r'"ieee" 5,267,456, "bf16" 5,267,456, autocast 2,6',
    ],
    "20_bfloat16_weights_stochastic_rounding": [
        r"nearest +mean 1\.0000",
        r"by chance +mean 1\.(29|30)",
        r"nearest 1\.000,.* by chance 0\.6",
        r"nearest +loss 1\.[3-9]",
    ],
    "21_eight_and_four_bits": [
        r"conv1 gradient +9\d\.\d% +2\.\d%",
        r"zero in E4M3 without a scale: 9\d\.\d%",
        r"bfloat16 none +bfloat16 none .* 0\.9",
        r"conv2d: .*not implemented",
    ],
    "23_running_statistics_of_a_skipped_update": [
        r"skipped updates 1, .* -> 0\.[2-6]",
        r"running_var\[0\]: (nan|inf)",
        r"evaluation in float32: nan",
        r"skipped updates 1, evaluation 0\.[2-6]\d+, of the average 0\.",
        r"counts: 39 of 40",
    ],
    "24_checkpointing_and_autocast": [
        r"bfloat16 +loss .* 26\.0 MiB",
        r"checkpointed loss .* 4\.5 MiB",
        r"bit for bit: True",
        r"CheckpointError: .*Recomputed values",
    ],
    "25_fully_sharded_data_parallel": [
        r"autocast bfloat16 +bfloat16 +float32 +float32",
        r"policy bfloat16 +bfloat16 +bfloat16 +float32",
        r"policy float16 +loss inf",
        r"rank 0 sees an inf: True +moved: False +scale 512",
        r"rank 1 sees an inf: False +moved: False +scale 512",
    ],
    "26_one_layer_in_float32": [r"2 Centre +3\d\.\d+% +3\d", r"5 Linear +2\d\.\d+% +0\.2", r"2 +Centre .* 0\.3\d\d%"],
    "22_float8_linear_layers": [r"one value of 100,000 +1\d\.\d% +3\.\d%", r"skipped: torchao|emulated: this device"],
}


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(path, *options, typed=""):
    """Run a program in a fork, which need not import PyTorch."""
    environment = tiny.environment(CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryFile() as answers:
        answers.write(typed.encode())
        answers.seek(0)
        return Result(*tiny.finish(Process(options, script=path, env=environment, stdin=answers), 300))


def quiz(path):
    return run(path, "--quiz", typed="my guess\n")


# The exercises: {number: (recipe, lines that go, lines that come, what the changed recipe says)}
EXERCISES = {
    int(number): (recipe, *("\n".join(re.findall(rf"^\{sign}(.*)$", change, re.MULTILINE)) for sign in "-+"), said)
    for number, recipe, change, said in re.findall(
        r"^## (\d+)\..*?```diff\n# (\w+\.py)\n(.*?)```.*?```text\n(.*?)\n```",
        (FOLDER / "EXERCISES.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
}


@pytest.fixture(scope="module")
def runs(request):
    """Start the recipes of the selected tests, two at a time; return a future result for each name."""
    selected = {
        item.callspec.params["recipe"]
        for item in request.session.items
        if "runs" in getattr(item, "fixturenames", ()) and item.path == request.path
    }
    with ThreadPoolExecutor(2) as pool:
        yield {path.stem: pool.submit(quiz, path) for path in sorted(selected)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_shows_its_point(recipe, runs):
    result = runs[recipe.stem].result()
    assert result.returncode == 0, result.stdout + result.stderr
    *_, rule, guess, answer = result.stdout.rstrip().splitlines()
    assert rule.startswith("RULE: ") and guess == "You guessed: my guess"
    assert re.fullmatch(r"Measured:    .*\w.*", answer) and "None" not in answer
    for pattern in TELLING[recipe.stem]:
        assert re.search(pattern, result.stdout), f"{pattern!r} is not in:\n{result.stdout}"
    assert "Warning" not in result.stderr, result.stderr
    question, _, shown = result.stdout.partition("Your guess: ")
    assert "?" in question
    own = [line for line in shown.splitlines()[:-1] if not line.startswith("[Gloo]")]  # PyTorch 2.9 prints these
    assert not [line for line in own if len(line) > 80], "too wide"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_stands_alone(recipe):
    text = recipe.read_text()
    imports = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    assert imports - {"torch", "torchvision"} <= set(sys.stdlib_module_names)
    assert "torch.cuda.amp" not in text, "deprecated; torch.amp takes the device"
    assert "Rule:" in text and "When it is broken:" in text.split('"""')[1]


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Run the changed recipes, two at a time; return a future result for each exercise."""
    folder = tmp_path_factory.mktemp("exercises")
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for number, (recipe, old, new, _) in EXERCISES.items():
            text = (FOLDER / recipe).read_text(encoding="utf-8")
            assert text.count(old) == 1, f"exercise {number}: not in {recipe}: {old}"
            changed = folder / f"{number}_{recipe}"
            changed.write_text(text.replace(old, new), encoding="utf-8")
            futures[number] = pool.submit(run, changed)
        yield futures


@pytest.mark.parametrize("number", range(1, 11))
def test_the_solution_of_an_exercise_does_what_it_says(number, solved):
    result = solved[number].result()
    said = EXERCISES[number][3]
    assert (result.returncode == 0) == said.startswith("RULE: ")
    assert said in (result.stdout if result.returncode == 0 else result.stderr), result.stderr
    assert result.returncode == 0 or "\nAssertionError" in result.stderr


def test_a_recipe_alone_asks_nothing_and_warns_of_nothing():
    """Started as a reader does, without the modules that a fork has already."""
    result = subprocess.run([sys.executable, RECIPES[1]], env=tiny.environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and "guess" not in result.stdout
    assert result.stdout.rstrip().splitlines()[-1].startswith("RULE: ")


def test_a_quiz_without_an_answer_goes_on():
    assert "You guessed: nothing" in run(RECIPES[1], "--quiz").stdout


def test_index_lists_every_recipe_in_order():
    index = (FOLDER / "README.md").read_text()
    listed = re.findall(r"^\| \[(\w+\.py)\]\((\w+\.py)\)", index, re.MULTILINE)
    assert [name for name, _ in listed] == [target for _, target in listed] == [path.name for path in RECIPES]
    assert set(TELLING) == {path.stem for path in RECIPES}


def test_a_missing_gpu_is_a_message():
    result = run(RECIPES[0], "--device", "cuda")
    assert result.returncode == 2
    assert "PyTorch sees no CUDA device" in result.stderr and "Traceback" not in result.stderr


def pooling(solution: str) -> type[torch.nn.Module]:
    """Return the pooling layer of recipe 15 with this body of its forward pass."""
    text = (FOLDER / "15_find_the_overflow.py").read_text(encoding="utf-8")
    (old,) = re.findall(r"^        with torch.amp.autocast\(values.*?sqrt\(\)$", text, re.DOTALL | re.MULTILINE)
    names = {"__name__": "changed"}
    exec(text.replace(old, solution), names)
    return names["RootMeanSquare"]


def wrong_by(solution: str, values: torch.Tensor) -> float:
    pooled = pooling(solution)(in_float32=True)(values.half())
    true = values.half().double().square().mean((2, 3)).sqrt()
    assert pooled.dtype == torch.float16 and pooled.shape == values.shape[:2]
    return (pooled.double() / true - 1).abs().max().item()


def test_the_third_cure_keeps_the_digits_that_a_fixed_divisor_costs():
    text = (FOLDER / "EXERCISES.md").read_text(encoding="utf-8")
    exercise = text.partition("## 7.")[2].partition("## 8.")[0]
    solution = "\n".join(re.findall(r"^\+(.*)$", exercise, re.MULTILINE))
    torch.manual_seed(0)
    noise = torch.randn(2, 64, 8, 8)
    for size in (0.01, 0.1, 1.0, 300.0):
        assert wrong_by(solution, size * noise) < 1e-3, "at most 0.1 %"
    assert pooling(solution)(in_float32=True)(torch.zeros(1, 2, 4, 4).half()).isfinite().all()
    assert pooling(solution)()(torch.full((1, 1, 2, 2), 300.0).half()).isinf().all(), "the overflow is still shown"
    fixed = "        return ((values / 64) * (values / 64)).mean((2, 3)){}.sqrt() * 64"
    assert 0.006 < wrong_by(fixed.format(""), 0.1 * noise) < 0.009
    assert 0.25 < wrong_by(fixed.format(".add(1e-6)"), 0.1 * noise) < 0.35
    assert "0.8 %" in exercise and "30 %" in exercise and "costs nothing" not in exercise
