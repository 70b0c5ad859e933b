"""Recipe 13: evaluation and inference.

Rule: model.eval(), torch.inference_mode(), autocast; no scaler, which serves gradients only. Validation and
test use the same precision; probabilities and metrics are computed from float32 logits.
Why: rounding moves the logits a little, so images near a class boundary change sides. Two precisions give
two accuracies for one model, and choosing by one and reporting the other compares unlike things.
When it is broken: validation and test differ with the same images; probabilities do not add up to one.
"""

import argparse
import sys

import torch
from torch import nn
from torch.nn import functional

QUESTION = """One model classifies 2048 images in float32 and in bfloat16. How many answers differ?"""


def make_images(count, seed, device):
    """Six classes, a pattern each, under so much noise that some images lie near a boundary."""
    patterns = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(6, (count,), generator=generator)
    images = patterns[labels] + 6 * torch.randn(count, 3, 16, 16, generator=generator)
    return images.to(device), labels.to(device)


def make_trained_model(device):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 6)
    ).to(device)
    images, labels = make_images(256, 1, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def predict(model, images, dtype):
    """(N, classes) float32 logits; the whole of AMP at inference is these lines."""
    model.eval()
    device = images.device.type
    with torch.inference_mode(), torch.amp.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return model(images).float()


def three_precisions(model, images, labels):
    logits = {dtype: predict(model, images, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    full = logits[torch.float32]
    changed = {}
    print("               accuracy   largest logit error   answers changed")
    for dtype, some in logits.items():
        changed[dtype] = (some.argmax(1) != full.argmax(1)).sum().item()
        accuracy = (some.argmax(1) == labels).float().mean().item()
        print(f"  {str(dtype)[6:]:<9} {accuracy:12.2%} {(some - full).abs().max().item():21.5f} {changed[dtype]:17}")
        assert some.dtype == torch.float32 and not some.requires_grad, "logits are not float32, or keep a graph"
    assert 0 < changed[torch.bfloat16] < 0.03 * len(labels) and changed[torch.float16] <= changed[torch.bfloat16], (
        "no answer changed in bfloat16, or many did, or more in float16"
    )
    return full, logits[torch.bfloat16]


def whose_answers_change(full, brain):
    """Show that the changed answers are those that were undecided before."""
    best = full.topk(2).values
    margin = best[:, 0] - best[:, 1]
    changed = full.argmax(1) != brain.argmax(1)
    print(
        f"  gap between the two best logits: {margin[changed].max().item():.4f} at most where the answer "
        f"changed,\n  {margin.median().item():.4f} for the median image"
    )
    assert margin[changed].max() < 0.1 * margin.median(), "answers changed where the two best logits were far apart"


def broken_probabilities(model, images):
    """Softmax of 16-bit logits, kept in 16 bits."""
    gaps = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        probabilities = predict(model, images, torch.bfloat16).to(dtype).softmax(1).to(dtype)
        gaps.append((probabilities.double().sum(1) - 1).abs().max().item())
        print(f"  softmax in {str(dtype)[6:]:<9} the worst sum of six probabilities is off by {gaps[-1]:.7f}")
    assert gaps[0] < 1e-6 < gaps[2] < gaps[1], "probabilities do not add up to 1 best in float32 and worst in bfloat16"


def broken_training_mode(model, images):
    """Autocast and inference_mode don't turn dropout off: eval() does."""
    answers = {}
    for name, training in (("eval()", False), ("train()", True)):
        model.train(training)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.inference_mode(), torch.amp.autocast(images.device.type, dtype=torch.bfloat16):
            first = model(images).argmax(1)
            second = model(images).argmax(1)
        model.load_state_dict(state)
        answers[name] = (first != second).float().mean().item()
    print(
        "  the same images twice, answers that differ: "
        + ", ".join(f"{share:.1%} in {name}" for name, share in answers.items())
    )
    assert answers["eval()"] == 0 < answers["train()"], "answers differ in eval(), or do not in train()"


def half_weights(model, images):
    """For inference alone the weights may be 16-bit too: half the memory, no casts, no autocast."""
    amp = predict(model, images, torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model = model.to(torch.bfloat16)
    with torch.inference_mode():
        cast = model(images.to(torch.bfloat16)).float()
    cast_size = sum(parameter.nbytes for parameter in model.parameters())
    same = (amp.argmax(1) == cast.argmax(1)).float().mean().item()
    print(f"  weights {size} -> {cast_size} bytes; same answers as autocast: {same:.1%}")
    assert cast_size * 2 == size and same > 0.98, (
        "16-bit weights are not half as large, or answer otherwise than autocast"
    )


def main(device):
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # compare with float32, not with TF32
    model = make_trained_model(device)
    images, labels = make_images(2048, 2, device)
    print(f"1. One model, 2048 images, three precisions ({device})")
    full, brain = three_precisions(model, images, labels)
    changed = (full.argmax(1) != brain.argmax(1)).sum().item()
    whose_answers_change(full, brain)
    print("2. Broken: probabilities in 16 bits")
    broken_probabilities(model, images)
    print("3. Broken: eval() forgotten")
    broken_training_mode(model, images)
    print("4. Weights in bfloat16, for inference only")
    half_weights(model.eval(), images)
    print("RULE: eval, inference_mode, autocast, no scaler; validate and test alike.")
    return f"{changed}, all of them undecided before"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quiz", action="store_true", help="ask a question first, then run and answer it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to run on the CPU")
    if args.quiz:
        print(f"{QUESTION}\nYour guess: ", end="", flush=True)
        guess = sys.stdin.readline().strip() or "nothing"
        print()
    answer = main(args.device)
    if args.quiz:
        print(f"You guessed: {guess}\nMeasured:    {answer}")
