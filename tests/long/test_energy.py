"""Joules from counters: RAPL's files and NVML, both fabricated."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from measuring import energy

CPU = torch.device("cpu")


def rapl(root, name, microjoules, size=1000):
    folder = root / name
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "name").write_text("package-0\n" if name.count(":") == 1 else "core\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{size - 1}\n")


def test_rapl_sums_packages_and_survives_an_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    rapl(tmp_path, "intel-rapl:0", 900)
    rapl(tmp_path, "intel-rapl:1", 100)
    rapl(tmp_path, "intel-rapl:0:0", 5)  # the cores are a part of their package
    joules = energy.energy_counter(CPU)
    assert joules() == 0
    rapl(tmp_path, "intel-rapl:0", 100)  # 200 further, past the end
    rapl(tmp_path, "intel-rapl:1", 150)
    rapl(tmp_path, "intel-rapl:0:0", 500)
    assert joules() == pytest.approx(250e-6)
    rapl(tmp_path, "intel-rapl:0", 400)
    assert joules() == pytest.approx(550e-6)


def test_without_a_counter_there_is_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    assert energy.energy_counter(CPU) is None
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    rapl(tmp_path, "intel-rapl:0", 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # what cannot be read
    assert energy.energy_counter(CPU) is None
    assert energy.energy_counter(torch.device("mps")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert energy.energy_counter(torch.device("cuda")) is None
    assert capsys.readouterr() == ("", "")


def test_nvml_is_asked_for_this_card_by_its_uuid(monkeypatch):
    asked = []
    used = iter([1000, 2500, 4000])
    fake = types.ModuleType("pynvml")
    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "handle"
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(used)  # millijoules
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    joules = energy.energy_counter(torch.device("cuda", 1))
    assert joules() == 2.5 and joules() == 4.0 and asked == ["GPU-12-34"]
