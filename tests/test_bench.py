"""`onestroke bench`: what is timed, and how it is told."""

from __future__ import annotations

import pytest
import torch

from onestroke import embedded
from onestroke.commands import bench
from onestroke.config import load_recipe
from onestroke.distill.add import ADD
from onestroke.evaluate.drawing import contenders, time_parts
from onestroke.evaluate.latency import PartTimer, measure_latency
from onestroke.types import Batch
from tests.consoles import paper, text_of
from tests.pipelines import tiny_sdxl


def test_bench_times_the_step_and_its_parts_and_leaves_the_player_trainable(weights, monkeypatch):
    trainers = []
    build = bench.add_trainer
    monkeypatch.setattr(bench, "add_trainer", lambda *a: trainers.append(build(*a)) or trainers[-1])
    times = bench.measure_step(load_recipe("mini", ["train.batch_size=2"]), rounds=2)
    assert set(bench.MAIN_PARTS) | {bench.STEP, bench.ENCODED} <= times.keys()
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    assert min(times[bench.STEP]) > min(times["text encoders"])
    rounds = 2 + bench.WARM_UPS
    assert [trainer.step for trainer in trainers] == [rounds, rounds]
    for trainer in trainers:
        for player in trainer.method.players.values():
            assert all(parameter.grad is None and parameter.requires_grad for parameter in player.module.parameters())


@pytest.mark.parametrize("real", ["reconstructed", "data"])
def test_the_encoded_step_works_on_the_same_latents_and_encodes_nothing(real, weights, monkeypatch):
    latents, given = {}, ADD._given

    def kept(method: ADD, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        images, found = given(method, batch)
        assert (images is None) == (batch.latents is not None and real == "reconstructed")
        latents[batch.latents is None, tuple(batch.slots.tolist())] = found
        return images, found

    monkeypatch.setattr(ADD, "_given", kept)
    bench.measure_step(load_recipe("mini", ["train.batch_size=2", f"discriminator.real={real}"]), rounds=0)
    encoded = [slots for is_plain, slots in latents if not is_plain and len(slots) == 2]
    assert len(encoded) == bench.WARM_UPS
    for slots in encoded:
        torch.testing.assert_close(latents[False, slots], latents[True, slots], rtol=0, atol=5e-3)


@pytest.mark.usefixtures("two_threads")
def test_where_threads_share_the_step_they_share_its_parts(weights, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "step_parts", lambda *a, build=bench.step_parts: made.append((a[0], build(*a))) or {})
    bench.measure_step(load_recipe("mini", ["train.batch_size=8"]), rounds=0)
    (trainer, parts), calls = made[0], []
    for view in trainer.views.made:
        view.student.unet.register_forward_hook(lambda module, given, output: calls.append(len(output[0])))
    part = parts["student forward and backward"]
    part.prepare()
    part.run()
    assert calls == [4, 4]
    players = [view.players[bench.STUDENT].module for view in trainer.views.made]
    assert all(parameter.grad is not None for player in players for parameter in player.parameters())
    part.clean()
    assert all(parameter.grad is None for player in players for parameter in player.parameters())


@pytest.mark.parametrize(("real", "decodes"), [("reconstructed", 2), ("data", 1)])
def test_decoder_and_features_are_timed_on_the_real_pictures_too(real, decodes, weights, monkeypatch):
    made = []
    monkeypatch.setattr(bench, "step_parts", lambda *a, build=bench.step_parts: made.append((a[0], build(*a))) or {})
    bench.measure_step(load_recipe("mini", ["train.batch_size=2", f"discriminator.real={real}"]), rounds=0)
    (trainer, parts), calls = made[0], []
    for module in (trainer.method.features, trainer.method.model.vae.decoder):
        module.register_forward_hook(lambda module, given, output: calls.append(module))
    for name, count in (("decode forward and backward", decodes), ("features forward and backward", 2)):
        parts[name].run()
        assert len(calls) == count and len(set(calls)) == 1
        calls.clear()


def test_the_steps_ratio_is_taken_within_the_round():
    times = {bench.STEP: [3.0, 30.0, 9.0], "a": [1.0, 10.0, 1.0], "b": [1.0, 10.0, 2.0]}
    assert bench.step_over(times, ["a", "b"]) == 1.5  # of 1.5, 1.5 and 3


def test_bench_train_step_prints_both_ratios(monkeypatch):
    parts = {
        bench.STEP: [0.2],
        bench.ENCODED: [0.15],
        **{name: [0.025] for name in bench.MAIN_PARTS},
        "text encoders": [0.075],
    }
    monkeypatch.setattr(bench, "measure_step", lambda recipe, *, rounds: parts)
    console = paper()
    bench.run_train_step(4, 1, console)
    printed = text_of(console)
    assert "125 ms" in printed and "200 ms" in printed  # the sums
    assert "step / the first five parts: 1.60" in printed and "step / all parts: 1.00" in printed
    assert "step, pictures encoded beforehand / the first five parts: 1.20" in printed


def test_bench_inference_takes_drawing_apart(weights):
    console = paper()
    bench.run_inference(1, console, teacher_steps=2)
    lines = [line for line in text_of(console).splitlines() if "student" in line or "teacher" in line]
    assert [line.split("│")[1].strip() for line in lines[:4]] == [
        "teacher, 2 steps",
        "student, 1 step",
        "student, 2 steps",
        "student, 4 steps",
    ]
    assert len(lines) == 8 and "1.0x" in lines[0]


def test_parts_of_a_shared_vae_are_counted_once(weights):
    student, teacher = embedded.embedded_student(), embedded.embedded_teacher()
    student.vae = teacher.vae
    for pipeline in (student, teacher):
        pipeline.set_progress_bar_config(disable=True)
    timer = PartTimer()
    ways = contenders(student, teacher, timer, guidance=2.0, teacher_steps=1, student_steps=(1,))
    rows = measure_latency(ways, timer, batch_sizes=(1,), num_runs=1, num_warmups=0)
    assert [row.steps for row in rows] == [1, 1] and rows[0].guidance == 2.0
    for row in rows:
        assert min(row.parts[name] for name in ("text", "unet", "vae")) > 0
        assert sum(row.parts.values()) == pytest.approx(row.total)


def test_every_unet_call_is_counted():
    calls = []
    pipeline = tiny_sdxl()
    pipeline.set_progress_bar_config(disable=True)
    timer = PartTimer()
    timer.timed = lambda name, call: lambda *a, **k: calls.append(name) or call(*a, **k)
    time_parts(timer, pipeline)
    pipeline("a person", num_inference_steps=3, guidance_scale=0.0)
    assert calls == ["text", "unet", "unet", "unet", "vae"]
