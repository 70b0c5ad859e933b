"""Recipe 21: eight and four bits, on the tensors of a ResNet.

Rule: below 16 bits each tensor needs a scale of its own, better one for each block of 32 values. E4M3 (3 bits of
fraction, up to 448) is for activations and weights, E5M2 (2 bits, up to 57,344) for gradients, E2M1 (1 bit, up
to 6) only in blocks. Convolutions stay in 16 bits: no library trains them in 8.
Why: one loss scale for the whole network suffices for float16, which spans 2**40; E4M3 spans 2**18, E2M1 2**4.
Eight bits pay in large linear layers on GPUs that multiply them (Ada, Hopper and later), as recipe 22 does.
When it is broken: without scales the gradients of convolutions become zero, nearly all of them; with one scale for
a whole tensor, four bits lose the small ones.
Everything is emulated: tensors are rounded to the format and back, products run in float32. --weights FILE takes a
ResNet-18 of yours (a state dict, or a run's best_model.pt); without it a small training of a few updates is made.
"""

import argparse
import sys
import warnings

import torch
import torchvision
from torch import nn
from torch.nn import functional

QUESTION = """Gradients of a ResNet's convolutions are cast to E4M3 without a scale. What share becomes zero?"""
LAYERS = ("conv1", "layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2", "fc")
FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # every magnitude of E2M1: PyTorch stores it, but does not cast
LARGEST = {"E4M3": 448.0, "E5M2": 57344.0, "E2M1": 6.0, "bfloat16": torch.finfo(torch.bfloat16).max}
BLOCK = 32


def cast(values, kind):
    """float32 to the format and back; what is too large becomes the largest number."""
    values = values.clamp(-LARGEST[kind], LARGEST[kind])
    types = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "bfloat16": torch.bfloat16}
    if kind in types:
        return values.to(types[kind]).float()
    table = torch.tensor(FOUR_BITS, device=values.device)
    middles = (table[1:] + table[:-1]) / 2
    return table[torch.bucketize(values.abs(), middles)] * values.sign()


def rounded(values, kind, scaling):
    """`values` as the format holds them: with no scale, one for the tensor, or a power of two for each block."""
    if scaling == "none":
        return cast(values, kind)
    if scaling == "tensor":
        scale = LARGEST[kind] / values.abs().max().clamp(min=1e-30)
        return cast(values * scale, kind) / scale
    blocks = functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST[kind] / largest)))  # E8M0, the scale of the MX formats
    return (cast(blocks * scale, kind) / scale).flatten()[: values.numel()].view_as(values)


def distance(some, true):
    """Relative error."""
    return ((some - true).norm() / true.norm()).item()


def make_model(device, weights):
    """Return a ResNet-18 in float32, from a file or from a few updates on random textures, and a batch for it."""
    torch.manual_seed(0)
    state = None
    if weights:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        state = state.get("model", state)
    model = torchvision.models.resnet18(num_classes=len(state["fc.bias"]) if state else 6)
    patterns = torch.randn(6, 3, 64, 64)
    labels = torch.arange(6).repeat(4).to(device)
    images = (patterns[labels.cpu()] + 2 * torch.randn(24, 3, 64, 64)).to(device)
    if state:
        model.load_state_dict(state)
        return model.to(device), images, labels
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model, images, labels


def tensors_of(model, images, labels):
    """Of each layer in LAYERS: its weight, what goes in, and the gradient of what comes out."""
    found = {}

    def watch(name, module):
        def after(_, inputs, output):
            found[name] = [module.weight.detach(), inputs[0].detach()]
            output.register_hook(lambda gradient: found[name].append(gradient.detach()))

        return module.register_forward_hook(after)

    hooks = [watch(name, model.get_submodule(name)) for name in LAYERS]
    functional.cross_entropy(model(images), labels).backward()
    for hook in hooks:
        hook.remove()
    return found


def errors_by_layer(found):
    print("                       E4M3   E4M3     E5M2   E5M2     E2M1   E2M1")
    print("  scale for each    nothing tensor  nothing tensor   tensor  block")
    zero = []
    for name, (weight, activation, gradient) in found.items():
        for what, values in (("weight", weight), ("input", activation), ("gradient", gradient)):
            pairs = [("E4M3", "none"), ("E4M3", "tensor"), ("E5M2", "none"), ("E5M2", "tensor")]
            numbers = [
                distance(rounded(values, *pair), values) for pair in (*pairs, ("E2M1", "tensor"), ("E2M1", "block"))
            ]
            cells = [f"{number:>7.1%}" for number in numbers]
            label = f"{name} {what}"
            print(f"  {label:<24}" + "".join(cells[:2]) + " " + "".join(cells[2:4]) + "  " + "".join(cells[4:]))
            assert numbers[1] < 0.06 and numbers[3] < 0.12 and numbers[5] < 0.2, (
                "a scaled format has fewer digits than it should"
            )
            assert numbers[1] < numbers[3] < numbers[5] < numbers[4] + 0.03, (
                "the formats' errors are not in the order of their digits"
            )
            if what == "gradient" and name != "fc":
                held = values[values != 0]
                zero.append((rounded(held, "E4M3", "none") == 0).float().mean().item())
    return zero


class Rounded(torch.autograd.Function):
    """Rounds on the way forward, on the way back, or on both; `None` lets pass."""

    @staticmethod
    def forward(context, values, forward, backward):
        context.backward_format = backward
        return values if forward is None else rounded(values, *forward)

    @staticmethod
    def backward(context, gradient):
        way = context.backward_format
        return gradient if way is None else rounded(gradient, *way), None, None


def emulate(model, images, labels, forward, backward):
    """One step, the factors of all convolutions and linear layers rounded. Returns logits and gradients (a vector)."""
    originals = {}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            originals[module] = module.forward

            def emulated(values, module=module):
                weight = Rounded.apply(module.weight, forward, None)
                values = Rounded.apply(values, forward, None)
                if isinstance(module, nn.Linear):
                    output = functional.linear(values, weight, module.bias)
                else:
                    output = functional.conv2d(values, weight, module.bias, module.stride, module.padding)
                return Rounded.apply(output, None, backward)

            module.forward = emulated
    model.zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, labels).backward()
    for module, original in originals.items():
        module.forward = original
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return logits.detach(), gradient


def whole_network(model, images, labels):
    model.eval()  # BatchNorm's statistics as they are, so that rounding is all that differs
    exact = emulate(model, images, labels, None, None)
    print(f"  {'forward':<18}{'backward':<18}{'error of logits':>16}{'cosine of gradients':>22}")
    angles = {}
    for forward, backward in (
        (("bfloat16", "none"), ("bfloat16", "none")),
        (("E4M3", "tensor"), ("E5M2", "tensor")),
        (("E4M3", "tensor"), ("E4M3", "tensor")),
        (("E4M3", "block"), ("E4M3", "block")),
        (("E4M3", "tensor"), ("E4M3", "none")),
        (("E2M1", "block"), ("E2M1", "block")),
        (("E2M1", "tensor"), ("E2M1", "tensor")),
    ):
        logits, gradient = emulate(model, images, labels, forward, backward)
        angles[forward, backward] = functional.cosine_similarity(gradient, exact[1], 0).item()
        print(
            f"  {' '.join(forward):<18}{' '.join(backward):<18}{distance(logits, exact[0]):>16.1%}"
            f"{angles[forward, backward]:>22.3f}"
        )
    brain, *eight, unscaled, blocks, four = angles.values()
    assert brain > 0.9 > max(eight) and min(eight) > 0.1 + max(unscaled, blocks, four), (
        "the directions of the gradients are not in the order of bits and scales"
    )


def no_kernels(device):
    """Show PyTorch's error for a convolution of eight bits."""
    images = torch.ones(1, 3, 8, 8, device=device).to(torch.float8_e4m3fn)
    weight = torch.ones(4, 3, 3, 3, device=device).to(torch.float8_e4m3fn)
    try:
        functional.conv2d(images, weight)
    except RuntimeError as error:
        print(f"  conv2d: {str(error).splitlines()[0][:68]}")
    else:
        raise AssertionError("there is a convolution of eight bits now: this recipe is out of date")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.amp.autocast("cpu", dtype=torch.float8_e4m3fn):
                output = functional.linear(torch.ones(1, 4), torch.ones(4, 4))
        except RuntimeError as error:
            print(f"  autocast: {str(error).splitlines()[0][:66]}")
        else:
            print(f"  autocast: {str(caught[0].message).splitlines()[0][:66]}")
            assert output.dtype == torch.float32, "autocast to eight bits did not stay in float32"


def main(device, weights=None):
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # compare with float32, not with TF32
    model, images, labels = make_model(device, weights)
    print(f"1. Error of each tensor: |rounded - true| / |true| ({device})")
    zero = errors_by_layer(tensors_of(model, images, labels))
    print(f"  convolutions' gradients, zero in E4M3 without a scale: {min(zero):.1%} to {max(zero):.1%}")
    print("2. A whole step in eval(), the factors of all products rounded (emulated)")
    whole_network(model, images, labels)
    print("3. What there is no kernel for")
    no_kernels(device)
    print("RULE: below 16 bits, a scale for each tensor or block; convolutions stay in 16.")
    return f"{min(zero):.1%} to {max(zero):.1%}, depending on the layer"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quiz", action="store_true", help="ask a question first, then run and answer it")
    parser.add_argument("--weights", metavar="FILE", help="state dict of a ResNet-18, or a run's best_model.pt")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; leave --device out to run on the CPU")
    if args.quiz:
        print(f"{QUESTION}\nYour guess: ", end="", flush=True)
        guess = sys.stdin.readline().strip() or "nothing"
        print()
    answer = main(args.device, args.weights)
    if args.quiz:
        print(f"You guessed: {guess}\nMeasured:    {answer}")
