"""Weights in the forms of TorchScript, torch.distributed.checkpoint, DeepSpeed, pruning and reparametrization."""

import warnings

import pytest
import test_foreign_weights as others
import tiny
import torch
import torch.distributed.checkpoint
from test_foreign_weights import assert_same, built, classifier, run_offered_line
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.utils import prune  # noqa: F401 (which torch.nn.utils does not import itself)

from pretrained.computed import with_computed
from pretrained.files import load_file

shell = others.shell  # a fixture


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_torchscript_archive_runs_nothing(tmp_path):
    """torch.jit.load would run __setstate__, which may write any file."""

    class Hostile(nn.Module):
        def __init__(self, target: str):
            super().__init__()
            self.target = target
            self.weight = torch.zeros(2)

        @torch.jit.export
        def __getstate__(self):
            return (self.weight, self.target, self.training)

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
            self.weight = state[0]
            self.target = state[1]
            self.training = state[2]
            torch.save(state[0], state[1])

    target = tmp_path / "written"
    torch.jit.script(Hostile(str(target))).save(tmp_path / "hostile.pt")
    torch.jit.load(tmp_path / "hostile.pt")
    assert target.exists()
    target.unlink()
    assert "is a TorchScript archive" in tiny.refused(load_file, tmp_path / "hostile.pt")
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize(("form", "name"), [("scripted", "a b.pt"), ("traced", "$(touch pwned).pt")])
def test_a_torchscript_archive_is_refused_with_the_line_that_saves_its_weights(
    shell, tmp_path, monkeypatch, form, name
):
    model = classifier().eval()
    archive = torch.jit.script(model) if form == "scripted" else torch.jit.trace(model, torch.zeros(1, 3, 36, 36))
    archive.save(tmp_path / name)
    run_offered_line(shell, tmp_path, name, monkeypatch)
    assert_same(built(tmp_path / "weights.pt"), model.state_dict())


def test_a_distributed_checkpoint_is_answered_with_the_line_that_joins_it(shell, tmp_path):
    state = classifier().state_dict()
    folder = tmp_path / "a $(touch pwned) b"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a single process, as is meant
        torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    for named in (folder, *folder.iterdir()):
        message = tiny.refused(load_file, named)
        assert "distributed checkpoint" in message
        (option, module, *words), made = shell(message.splitlines()[-1])
        assert (option, module) == ("-m", "torch.distributed.checkpoint.format_utils") and made == []
    assert words == ["dcp_to_torch", str(folder), "weights.pt"]
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt"), state)


def test_parts_that_deepspeed_writes_are_refused_and_whole_weights_are_read(tmp_path):
    state = classifier().state_dict()
    content = {"module": state, "ds_version": "0.15", "ds_config": {"zero_optimization": {"stage": 1}}}
    whole = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(content, whole)
    assert_same(built(whole), state)
    for name in ("zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        assert "zero_to_fp32.py" in tiny.refused(load_file, tmp_path / name)
    torch.save(content, tmp_path / "mp_rank_01_model_states.pt")
    assert "one process's part of a network" in tiny.refused(load_file, whole)
    (tmp_path / "zero_to_fp32.py").touch()
    assert "python zero_to_fp32.py" in tiny.refused(load_file, tmp_path)


def reparametrized(kind: str) -> tuple[dict, dict]:
    """Return the state dict of such a network, and the weights that its layers compute with."""
    model = classifier()
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        if kind == "prune":
            nn.utils.prune.l1_unstructured(layer, "weight", 0.3)
        elif kind == "prune bias":
            nn.utils.prune.random_unstructured(model.fc, "bias", 1)
        elif kind == "parametrizations.weight_norm":
            nn.utils.parametrizations.weight_norm(layer)
        elif kind == "weight_norm of all":
            nn.utils.parametrizations.weight_norm(layer, dim=None)
        elif kind == "weight_norm":
            nn.utils.weight_norm(layer)
        elif kind == "parametrizations.spectral_norm":
            nn.utils.parametrizations.spectral_norm(layer)
        elif kind == "spectral_norm":
            nn.utils.spectral_norm(layer)
        elif kind == "orthogonal" and isinstance(layer, nn.Linear):
            nn.utils.parametrizations.orthogonal(layer)
    model.eval()(torch.zeros(1, 3, 36, 36))  # hooks compute at each pass
    state = model.state_dict()
    plain = classifier().state_dict()
    for name in plain:
        module, _, parameter = name.rpartition(".")
        plain[name] = getattr(model.get_submodule(module), parameter).detach().clone()
    return state, plain


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "prune",
        "prune bias",
        "weight_norm",
        "weight_norm of all",
        "parametrizations.weight_norm",
        "spectral_norm",
        "parametrizations.spectral_norm",
    ],
)
def test_weights_that_are_kept_in_parts_are_computed_and_said_to_be(tmp_path, said, kind):
    prefix = "module.backbone." if "parametrizations" in kind or kind == "prune" else ""
    state, plain = reparametrized(kind)
    assert state.keys() != plain.keys()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "weights.pt")
    assert_same(built(tmp_path / "weights.pt"), plain, 1e-6)
    assert ("pruned weights" if "prune" in kind else kind.split(".")[-1].split()[0]) in said.messages[-1]
    assert "tensors computed" in said.messages[-1]


def test_a_parametrization_that_is_not_known_is_named_and_names_that_end_alike_are_left_alone(tmp_path):
    torch.save(reparametrized("orthogonal")[0], tmp_path / "weights.pt")
    message = tiny.refused(built, tmp_path / "weights.pt")
    assert "remove_parametrizations" in message and "fc.parametrizations.weight" in message
    state = {"a_orig": torch.ones(2), "b_g": torch.ones(3, 2), "b_v": torch.ones(3, 2), "c_mask": torch.ones(1)}
    assert with_computed(state) == (state, "")
