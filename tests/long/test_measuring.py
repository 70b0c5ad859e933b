"""The doctor examines this machine for real: processes of its own, real measurements."""

import json

import pytest
import torch

from commands import doctor
from measuring import probe
from reports.doctor import doctor_text
from utils import RunError

CPU = torch.device("cpu")


def test_examination_end_to_end(scenes_folder, monkeypatch):
    monkeypatch.setattr(probe, "ROUND_SECONDS", 0.1)
    monkeypatch.setitem(probe.PRODUCT_SIZE, "cpu", 64)
    found = doctor.examine(CPU, image_size=32, batch_size=4, model_name="squeezenet1_1", data_dir=scenes_folder)
    assert set(found["measured"]) == {"fp32", "amp-bf16"} and not found["failed"]
    for measured in found["measured"].values():
        assert measured["images_per_second"] > 0 and len(measured["rounds"]) == probe.ROUNDS
        phases = measured["phase_seconds"]
        assert sum(phases.values()) == pytest.approx(measured["seconds_per_update"], rel=0.5)
        assert all(value > 0 for value in phases.values()) and phases["backward"] > phases["data"] / 10
        assert sum(measured["shares"].values()) == pytest.approx(1)
        assert measured["shares"]["products"] > 0.1
    assert "times as long as in FP32" in found["machine"]["float16"], "timed, whatever the instructions promise"
    assert found["loader_images_per_second"] > 0
    assert f"--image_size 32 --batch_size 4 --data_dir {scenes_folder}" in found["command"]
    json.dumps(found)
    assert all(len(line) <= 80 for line in doctor_text(found).splitlines())


def test_a_failing_process_gives_its_reason():
    child = probe.Probe(device="cpu", precision="fp32", model_name="alexnet", image_size=16, batch_size=2)
    try:
        with pytest.raises(RunError, match="size"):  # alexnet is too deep for 16 pixels
            child.ask("warm_up")
    finally:
        child.close()
