"""Class weights: an image's loss has the weight of its own class, with label smoothing and mixed labels, too."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from optimizer import SmoothedCrossEntropy, balanced_weights

IMAGES, CLASSES = 7, 4
WEIGHTS = torch.tensor([0.1, 3.0, 0.7, 40.0], dtype=torch.float64)


def drawn(dtype=torch.float64, mixed=False):
    """Logits that ask for a gradient, and labels: class indices, or the shares of two classes."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(IMAGES, CLASSES, generator=generator, dtype=torch.float64)
    first, second = torch.randint(CLASSES, (2, IMAGES), generator=generator)
    labels = first
    if mixed:
        share = torch.rand(IMAGES, 1, generator=generator, dtype=torch.float64)
        labels = share * F.one_hot(first, CLASSES) + (1 - share) * F.one_hot(second, CLASSES)
        labels = labels.to(dtype)
    return logits.to(dtype).requires_grad_(), labels


def closed_form(logits, shares, weights, smoothing) -> float:
    """Compute the docstring's formula, term by term, with NumPy."""
    total = 0.0
    for z, q in zip(logits.tolist(), shares.tolist(), strict=True):
        surprise = np.log(np.exp(np.array(z)).sum()) - np.array(z)
        for c in range(CLASSES):
            total += q[c] * weights[c] * ((1 - smoothing) * surprise[c] + smoothing / CLASSES * surprise.sum())
    return total


@pytest.mark.parametrize("mixed", [False, True], ids=["indices", "shares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.99])
def test_the_weighted_loss_is_its_closed_form_and_without_weights_pytorchs_bit_for_bit(smoothing, mixed):
    logits, labels = drawn(mixed=mixed)
    shares = labels if mixed else F.one_hot(labels, CLASSES)
    found = SmoothedCrossEntropy(smoothing, WEIGHTS)(logits, labels)
    assert found.item() == pytest.approx(closed_form(logits, shares, WEIGHTS.tolist(), smoothing), rel=1e-12)
    theirs = nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for criterion in (SmoothedCrossEntropy(smoothing), theirs):
            logits, labels = drawn(dtype, mixed)
            loss = criterion(logits, labels)
            loss.backward()
            results.append((loss, logits.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    logits, labels = drawn(torch.float32, mixed)
    weighted = SmoothedCrossEntropy(smoothing, WEIGHTS.float())
    with torch.autocast("cpu", torch.bfloat16):  # which rounds logits, and no weight
        found = weighted(logits.bfloat16(), labels)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(weighted(logits.bfloat16().float(), labels).item(), rel=1e-6)


def test_weights_do_not_move_what_an_image_is_to_be_taken_for():
    """The gradient is zero where the prediction is the smoothed label, and grows with the image's own weight alone."""
    labels = torch.arange(CLASSES)
    smoothed = 0.9 * torch.eye(CLASSES, dtype=torch.float64) + 0.1 / CLASSES
    logits = smoothed.log().requires_grad_()
    SmoothedCrossEntropy(0.1, WEIGHTS)(logits, labels).backward()
    assert logits.grad.abs().max() < 1e-12
    away, _ = drawn()
    gradients = []
    for weights in (None, WEIGHTS):
        away.grad = None
        SmoothedCrossEntropy(0.1, weights)(away[:CLASSES], labels).backward()
        gradients.append(away.grad[:CLASSES].clone())
    torch.testing.assert_close(gradients[1], WEIGHTS[:, None] * gradients[0])


def test_balanced_weights_have_mean_one_and_none_is_infinite():
    labels = torch.tensor([0] * 6 + [2] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = balanced_weights(labels, 4)
    assert weights.tolist() == [0.75, 0, 1.5, 0] and weights.dtype == torch.float32
    assert weights[labels].mean() == 1


@pytest.mark.parametrize("counts", [(400, 4), (100, 100, 100, 100, 100, 1)])
def test_classes_that_are_easy_to_tell_apart_are_learned_however_uneven(counts):
    """A linear layer on one-hot inputs; with nn.CrossEntropyLoss(weights) 400:4 ends at 1 % accuracy."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    inputs = F.one_hot(labels, len(counts)).float()
    criterion = SmoothedCrossEntropy(0.1, balanced_weights(labels, len(counts)))
    torch.manual_seed(0)
    layer = nn.Linear(len(counts), len(counts))
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (criterion(layer(inputs), labels) / len(labels)).backward()
        optimizer.step()
    predicted = layer(inputs).softmax(1)
    assert (predicted.argmax(1) == labels).all()
    assert predicted[labels == 0, -1].max() < 0.1  # 0.05 and 0.017 if the smoothed label is met


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Forty dark images and three bright ones to train on, in two classes; two of each to test."""
    folder = tmp_path_factory.mktemp("uneven")
    numbers = np.random.default_rng(5)
    for part, counts in (("train", (40, 3)), ("test", (2, 2))):
        for name, count, grey in zip(("dark", "bright"), counts, (40, 180), strict=True):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = grey + numbers.integers(0, 40, (36, 36, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def test_a_preset_with_class_weights_learns_both_classes(uneven, tmp_path):
    words = ["--preset=finetune", "--start_size=0", "--class_weights=balanced", "--ema=0", "--epochs=6"]
    assert tiny.train(uneven, tmp_path, *words, "--learning_rate=0.05", "--augment=none", "--mixup=0.1") == 0
    assert tiny.config(tmp_path / "run")["options"]["label_smoothing"] == 0.1
    last = tiny.metrics(tmp_path / "run")[-1]
    assert last["val_acc"] == last["val_balanced_acc"] == 100


def test_a_class_that_is_in_the_test_part_alone_is_named(uneven, tmp_path, run):
    table = tmp_path / "labels.csv"
    rows = [f"{path.relative_to(uneven)},{path.parent.name},{path.parts[-3]}" for path in uneven.rglob("*.png")]
    rows = [row.replace("bright,test", "unseen,test") for row in rows]
    table.write_text("\n".join(["path,label,split", *rows]))
    words = tiny.words(uneven, tmp_path, f"--labels={table}", "--class_weights=balanced", "--label_smoothing=0.1")
    status, _, errors = run(words)
    assert status == 2 and "unseen" in errors and "learning rate" not in errors and "Warning" not in errors
