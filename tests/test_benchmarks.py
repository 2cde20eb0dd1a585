"""The benchmarks run on a tiny architecture: what they print is what a GPU's owner will see."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipelines import tiny_sdxl

from onestroke.export import export_folder
from tests.servers import client_of, tiny_drawer

ROOT = Path(__file__).parent.parent


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_folder(tiny_sdxl(), tmp_path_factory.mktemp("model") / "tiny")


def test_inference_prints_each_way_to_draw_by_part(folder, tmp_path):
    out = tmp_path / "figures.json"
    text = run("inference.py", "--architecture", str(folder), "--sizes", "32,64", "--rounds", "1",
               "--teacher-steps", "3,2", "--skip", "compiled", "--out", str(out))  # fmt: skip
    figures = json.loads(out.read_text())
    assert set(figures["sizes"]) == {"32", "64"}
    for rows in figures["sizes"].values():
        assert [row["label"] for row in rows] == [
            "teacher, 3 steps", "teacher, 2 steps", "student, 1 step, eager", "student, 1 step, tiny",
        ]  # fmt: skip
        for row in rows:
            assert min(row["parts"][name] for name in ("text", "unet", "vae")) > 0
            assert row["seconds"] >= sum(row["parts"].values()) * 0.99 and row["label"] in text


def test_train_step_compares_speed_and_memory(folder, tmp_path):
    out = tmp_path / "figures.json"
    text = run("train_step.py", "--architecture", str(folder), "--size", "64", "--batch", "2", "--rounds", "1",
               "--variants", "plain,scale,tiny,leanest", "--out", str(out))  # fmt: skip
    figures = json.loads(out.read_text())
    rows = figures["variants"]
    assert list(rows) == ["plain", "scale", "tiny", "leanest"]
    assert rows["plain"]["speed_ratio"] == rows["plain"]["memory_ratio"] == 1
    assert all(row["pictures_a_second"] > 0 and row["memory_mib"] > 0 for row in rows.values())
    assert figures["tera_operations_a_step"] > 0 and "decode.scale 0.5" in text


def test_studio_latency_sees_the_parts_of_what_the_server_draws():
    spec = importlib.util.spec_from_file_location("studio_latency", ROOT / "benchmarks" / "studio_latency.py")
    studio_latency = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(studio_latency)
    drawer = tiny_drawer()
    parts = studio_latency.PartTimes(drawer)
    with client_of(drawer) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        warmed = len(parts.found)
        assert client.post("/v1/images/generations", json={"prompt": "a cat", "size": "64x64"}).status_code == 200
    assert len(parts.found) == warmed + 1 and min(parts.found[-1].values()) > 0
