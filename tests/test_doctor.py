"""`onestroke doctor`."""

from __future__ import annotations

import re
import sys

import torch

from onestroke import embedded
from onestroke.commands import doctor
from tests.consoles import paper, text_of


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "weights_folder", lambda: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    console = paper()
    doctor.run_doctor(console)
    printed = text_of(console)
    for topic in ("python", "cores", "memory", "disk", "dtypes on cpu", "fastest on the CPU", "torch.compile"):
        assert topic in printed
    assert re.search(r"ok\s+│ efficientnet-lite0", printed)
    assert "dinov2-large: hf download facebook/dinov2-large" in printed
    assert "laion/CLIP-ViT-g-14" in printed
    assert re.search(r"no\s+│ embedded weights\s+│ no teacher, student, judge", printed)


def test_doctor_finds_the_weights_and_survives_a_missing_package(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = {finding.topic: finding for finding in doctor.findings()}
    assert found["embedded weights"].ok
    assert found["feature networks"].state.startswith("cannot look: huggingface_hub")


def test_a_cached_network_counts_only_when_it_is_whole(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--who--net"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert not doctor.is_cached("who/net")
    save_file({"a": torch.zeros(100)}, snapshot / "model.safetensors")
    assert doctor.is_cached("who/net")
    whole = (snapshot / "model.safetensors").read_bytes()
    (snapshot / "model.safetensors").write_bytes(whole[:100])
    assert not doctor.is_cached("who/net")


def test_a_dtype_that_a_device_lacks_does_not_work():
    assert doctor.dtype_works(torch.device("cpu"), torch.float32)
    assert not doctor.dtype_works(torch.device("cpu"), torch.float8_e4m3fn)
