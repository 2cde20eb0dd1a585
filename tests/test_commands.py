"""The commands: what they refuse, what they print, and what they leave on the disk."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from onestroke import cli, embedded
from onestroke.commands import bench, demo, distill, doctor, generate, pretrain
from onestroke.commands.progress import Display, clock_time, summary
from onestroke.config import load_recipe, pretrain_recipe, save_recipe
from onestroke.data.comicset import ComicSource, write_comicset
from onestroke.distill.denoising import Denoising
from onestroke.embedded.architecture import build_pipeline
from onestroke.embedded.autoencoder import build_autoencoder
from onestroke.embedded.judge import new_judge, save_judge
from onestroke.embedded.vocabulary import known_words, unknown_words, words_in
from onestroke.errors import CheckpointError, ModelError, OnestrokeError, RecipeError, ResourceError
from onestroke.evaluate.compare import Ways
from onestroke.evaluate.drawing import contenders, time_parts
from onestroke.evaluate.latency import PartTimer, measure_latency
from onestroke.evaluate.pictures import Way
from onestroke.families.fingerprint import fingerprint
from onestroke.train.trainer import Progress
from tests.pipelines import tiny_sd, tiny_sdxl

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def untrained_weights(tmp_path_factory) -> Path:
    """The embedded models before their first step, laid out as in the package."""
    folder = tmp_path_factory.mktemp("weights")
    source = ComicSource(100)
    pipeline = build_pipeline(build_autoencoder(), [source.caption(index) for index in range(len(source))])
    pipeline.save_pretrained(folder / "teacher")
    pipeline.unet.save_pretrained(folder / "student" / "unet")
    save_judge(new_judge(), folder / "judge.safetensors")
    return folder


@pytest.fixture
def weights(untrained_weights, monkeypatch) -> Iterator[Path]:
    monkeypatch.setattr(embedded, "weights_folder", lambda: untrained_weights)
    embedded.embedded_judge.cache_clear()
    yield untrained_weights
    embedded.embedded_judge.cache_clear()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for command in (bench, distill, generate, pretrain):
        monkeypatch.setattr(command, "cap_threads", lambda: None)


def paper(width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width)


def text_of(console: Console) -> str:
    return console.file.getvalue()


def onestroke(*arguments: str, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit status, output and errors of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["onestroke", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    else:
        status = 0
    output = capsys.readouterr()
    return status, output.out, output.err


# generate


def test_generate_writes_the_same_picture_again_with_what_it_was_drawn_from(weights, tmp_path):
    console = paper()
    for name in ("a.png", "b.png"):
        generate.run_generate(
            "a laughing person", tmp_path / name, "embedded", steps=1, seed=7, guidance=0.0, count=2, console=console
        )
    image = Image.open(tmp_path / "a.png")
    assert image.size == (256, 128)
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "b.png")))
    assert {"prompt": "a laughing person", "seed": "7", "steps": "1", "model": "embedded"}.items() <= image.text.items()
    assert image.text["software"].startswith("onestroke ")
    assert re.search(r"a\.png \(\d+\.\d\d s to draw\)", text_of(console))
    assert "note" not in text_of(console)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_pictures_side_by_side_are_those_of_the_seeds_one_by_one(weights, tmp_path):
    for name, seed, count in (("both.png", 3, 2), ("second.png", 4, 1)):
        generate.run_generate(
            "a person", tmp_path / name, "embedded", steps=1, seed=seed, guidance=0.0, count=count, console=paper()
        )
    both, second = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("both.png", "second.png"))
    assert np.abs(both[:, 128:] - second).max() <= 8  # bfloat16 rounds otherwise in another batch
    assert np.abs(both[:, :128] - second).max() > 8


def test_generate_draws_portraits_and_landscapes(weights, monkeypatch, capsys, tmp_path):
    for options, size in ((("--width", "96", "--height", "160"), (96, 160)), (("--width", "168"), (168, 128))):
        out = tmp_path / "a.png"
        status, _, error = onestroke("generate", "a person", "-o", str(out), *options, monkeypatch=monkeypatch,
                                     capsys=capsys)  # fmt: skip
        assert status == 0 and Image.open(out).size == size, error
    status, _, error = onestroke("generate", "a person", "-o", str(out), "--width", "100", monkeypatch=monkeypatch,
                                 capsys=capsys)  # fmt: skip
    assert status == 1 and "--width: 100 pixels cannot be drawn. Give a multiple of 8." in error


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_carry_the_prompt_in_exif(suffix, tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    generate.save_picture(picture, tmp_path / f"a.{suffix}", {"prompt": "a café 笑", "software": "onestroke 1"})
    description = Image.open(tmp_path / f"a.{suffix}").getexif()[0x010E]
    assert description == '{"prompt": "a caf\\u00e9 \\u7b11", "software": "onestroke 1"}'


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path):
    out = tmp_path / "a.webp"
    out.write_bytes(b"old")
    with pytest.raises(ResourceError, match="cannot be written"):
        generate.save_picture(np.zeros((4, 20_000, 3), np.uint8), out, {"software": "x"})  # WebP ends at 16,383 px
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_generate_refuses_bad_orders_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    orders = {
        ("  ", str(tmp_path / "a.png")): "the prompt is empty",
        ("a person", str(tmp_path / "a.tiff")): ".tiff",
        ("a person", str(tmp_path / "a")): "without a suffix",
        ("a person", str(tmp_path / "file" / "a.png")): "cannot be written",
    }
    for (prompt, out), part in orders.items():
        status, printed, error = onestroke("generate", prompt, "-o", out, monkeypatch=monkeypatch, capsys=capsys)
        assert status == 1 and part in error and error.count("\n") == 1 and not printed


def test_a_prompt_that_is_cut_or_unknown_is_named(weights):
    pipeline = embedded.embedded_student()
    words = pipeline.tokenizer.model_max_length - 2
    assert generate.warnings_about("a " * words, pipeline, "embedded") == []
    long, strange = generate.warnings_about("a " * (words + 3) + "Zeppelin", pipeline, "embedded")
    tokens = len(pipeline.tokenizer("Zeppelin").input_ids) - 2
    assert f"its last {3 + tokens} of {words + 3 + tokens} tokens" in long and "'zeppelin'" in strange
    assert generate.warnings_about("a zeppelin", pipeline, "some/folder") == []


# the vocabulary


def test_known_words_are_those_of_captions():
    source = ComicSource(4000)
    seen = {word for index in range(0, 4000, 3) for word in words_in(source.caption(index))}
    assert seen <= known_words()
    assert len(known_words() - seen) < 0.15 * len(known_words())  # rare phrases
    assert set(embedded.vocabulary.FUNCTION_WORDS) <= seen


def test_words_outside_the_vocabulary_are_told_once_and_in_order():
    assert unknown_words("A laughing person with pink hair and round glasses") == []
    assert unknown_words("a dragon, a castle and a DRAGON with 3 heads") == ["dragon", "castle", "heads"]


# distill


def test_a_teacher_without_a_recipe_gets_its_familys_at_its_own_size(tmp_path):
    for name, pipeline, recipe in (("xl", tiny_sdxl(), "sdxl-anime"), ("sd", tiny_sd(), "sd15")):
        pipeline.save_pretrained(tmp_path / name)
        resolved = distill.resolve_recipe(None, str(tmp_path / name), None, "pictures: of #1")
        assert (resolved.name, resolved.data.size, resolved.data.source) == (recipe, 64, "pictures: of #1")
        if not torch.cuda.is_available():
            assert resolved.train.device == "auto"


def test_configs_tell_what_loading_the_weights_would(tmp_path):
    from onestroke.families.load import load_model

    tiny_sdxl().save_pretrained(tmp_path / "xl")
    model = load_model(tmp_path / "xl")
    assert distill.inspect_teacher(str(tmp_path / "xl")) == distill.TeacherTraits(model.family.name, model.default_size)


def test_options_override_a_recipe_and_set_overrides_options():
    resolved = distill.resolve_recipe("mini", "123", None, "~", ["data.source=mine", "train.batch_size=8"])
    assert (resolved.teacher.source, resolved.data.source, resolved.train.batch_size) == ("123", "mine", 8)
    assert distill.resolve_recipe(None, "embedded", None, None).name == "mini"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((None, None, None, None), "onestroke distill mini"),
        (("sdxl-anime", None, None, "pictures"), "--teacher"),
        (("sdxl-anime", "model", None, None), "--data"),
        (("minni", None, None, None), "mini"),
    ],
)
def test_what_a_run_still_lacks_is_named(arguments, part):
    with pytest.raises(RecipeError, match=part):
        distill.resolve_recipe(*arguments)


def test_a_teacher_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        distill.resolve_recipe(None, str(tmp_path / "nowhere"), None, "pictures")


def test_distill_leaves_a_student_and_goes_on_from_it(weights, tmp_path):
    settings = ["train.batch_size=2", "train.num_images=4", "train.sample_images=0", "data.num_workers=0"]
    settings += ["train.evaluate_images=4", "train.evaluate_count=2"]
    out = tmp_path / "a run"
    for expected in ("after 2 of 4 pictures", "finished"):
        console = paper()
        distill.run_distill(
            "mini", None, None, None, settings, 0.0 if "after" in expected else None, out, console=console
        )
        assert expected in text_of(console)
    assert "evaluation after 4 pictures" in text_of(console)
    assert f"best:    {out}/best (the one of 4 pictures" in text_of(console)
    console = paper()
    lines = distill.next_commands(distill.resolve_recipe("mini", None, None, None), out / "student", out)
    assert (out / "student" / "model_index.json").exists()
    assert f"--model '{out}/student'" in lines[0] and lines[2].startswith("onestroke evaluate")
    generate.run_generate(
        "a person", tmp_path / "a.png", str(out / "student"), steps=1, seed=0, guidance=0.0, count=1, console=console
    )
    assert "a.png" in text_of(console)


# progress


def gan_step(step: int, seconds: float, **terms: float) -> Progress:
    return Progress(step, 100 + 16 * step, seconds, terms)


def test_lines_come_every_ten_seconds_and_at_the_end():
    now = 0.0
    console = paper()
    with Display(console, 1000, "run", clock=lambda: now) as observe:
        for step in range(1, 16):
            now = 2.0 * step
            observe(gan_step(step, now, **{"denoiser/loss": 0.5}), 30.0)
    lines = text_of(console).splitlines()
    assert [re.search(r"([\d,]+)/1,000", line)[1] for line in lines] == ["116", "196", "276", "340"]
    assert lines[-1] == "run: 340/1,000 pictures (34%), 8.0 pictures/s, 0:30 left; denoiser/loss 0.5000"


def test_a_terminal_shows_the_same_in_place():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    with Display(console, 1000, "run") as observe:
        observe(gan_step(1, 1.0, **{"denoiser/loss": 0.5}), None)
    assert "116/1,000" in text_of(console)


def test_a_display_that_saw_no_step_prints_nothing():
    console = paper()
    with Display(console, 1000, "run") as observe:
        pass
    assert text_of(console) == "" and observe.images == 0


def test_summary_averages_logits_over_heads():
    terms = {
        "student/adversarial": 0.25,
        "student/distillation": 0.5,
        "student/loss": 9.0,
        "discriminator/real_0": 1.0,
        "discriminator/real_1": 3.0,
        "discriminator/fake_0": -1.0,
        "discriminator/real_positive_0": 50.0,
    }
    assert summary(terms) == "adversarial 0.250, distillation 0.500, real logits +2.00, fake logits -1.00"
    assert [clock_time(seconds) for seconds in (5, 485, 3723)] == ["0:05", "8:05", "1:02:03"]


# pretrain


def tiny_pretrain(*overrides: str):
    small = ("size=32", "vae_images=8", "judge_images=1", "decoder_images=8", "teacher_images=32")
    return pretrain_recipe([*small, *overrides])


def test_pretrain_of_the_users_pictures_leaves_a_teacher_and_goes_on(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32, layout="webdataset")
    pictures = str(tmp_path / "pictures" / "*.tar")
    for minutes, expected in ((0.0, "run the same command again"), (None, "distill mini --teacher")):
        console = paper()
        pretrain.run_pretrain(pictures, tiny_pretrain(), minutes, tmp_path / "out", console=console)
        assert expected in text_of(console)
    assert (tmp_path / "out" / "teacher" / "model_index.json").exists()
    config = json.loads((tmp_path / "out" / "teacher" / "unet" / "config.json").read_text())
    assert 8 * config["sample_size"] == tiny_pretrain().size  # what plain diffusers draws where no size is asked for
    assert not (tmp_path / "out" / "judge").exists()


def test_minutes_bound_the_stages_together(monkeypatch, tmp_path):
    calls = []

    def latents(out, source, recipe, machine, *, log) -> None:
        calls.append("latents")

    def decoder(out, source, cache, recipe, machine, *, log) -> None:
        calls.append("decoder")

    def text(out, source, recipe, machine, *, minutes, observe) -> bool:
        calls.append("text")
        return True

    def teacher(out, source, cache, recipe, machine, *, minutes, observe, log) -> bool:
        calls.append(minutes)
        return True

    monkeypatch.setattr(pretrain, "pretrain_vae", lambda out, source, recipe, machine, *, log: calls.append("vae"))
    monkeypatch.setattr(pretrain, "pretrain_judge", lambda out, recipe, machine, *, log: calls.append("judge"))
    monkeypatch.setattr(pretrain, "pretrain_latents", latents)
    monkeypatch.setattr(pretrain, "pretrain_decoder", decoder)
    monkeypatch.setattr(pretrain, "pretrain_text", text)
    monkeypatch.setattr(pretrain, "pretrain_teacher", teacher)
    pretrain.run_pretrain(None, tiny_pretrain(), 10.0, tmp_path, console=paper())
    assert calls[:5] == ["vae", "judge", "text", "latents", "decoder"] and 9.9 < calls[5] <= 10.0
    pretrain.run_pretrain(None, tiny_pretrain(), 0.0, tmp_path, console=paper())
    assert calls[6:] == ["vae"]
    calls.clear()
    monkeypatch.setattr(pretrain, "adopt_vae", lambda teacher, out: calls.append(teacher))
    pretrain.run_pretrain(None, pretrain_recipe(["start=embedded-teacher"]), None, tmp_path, console=paper())
    assert calls == ["embedded-teacher", "vae", "latents", None]  # no judge is of use to it, and its words are known


def test_pretrain_goes_on_from_a_teacher_with_its_own_vae(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32)
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain(), None, first, console=paper())
    again = tiny_pretrain(f"start={first / 'teacher'}")
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    before, after = (load_file(f / "teacher" / "unet" / "diffusion_pytorch_model.safetensors") for f in (first, second))
    moved = [(before[name] - after[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 0.1
    taken = tiny_pretrain(f"vae={first / 'teacher'}")  # its VAE alone: the rest is new
    pretrain.run_pretrain(str(tmp_path / "pictures"), taken, 0.0, tmp_path / "taken", console=paper())
    one = AutoencoderKL.from_pretrained(first / "teacher", subfolder="vae")
    other = AutoencoderKL.from_pretrained(tmp_path / "taken" / "vae" / "final")
    assert fingerprint(one) == fingerprint(other)
    other = tmp_path / "third"
    build_autoencoder().save_pretrained(other / "vae" / "final")
    with pytest.raises(ModelError, match="another VAE"):
        pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, other, console=paper())


def test_a_new_decoder_goes_under_a_trained_teacher(tmp_path):
    write_comicset(tmp_path / "pictures", count=40, size=32)
    first, second = tmp_path / "first", tmp_path / "second"
    pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain("decoder_images=0"), None, first, console=paper())
    again = tiny_pretrain(f"start={first / 'teacher'}", "teacher_images=0", "decoder_images=16")
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    before, after = (DiffusionPipeline.from_pretrained(folder / "teacher") for folder in (first, second))
    assert fingerprint(before.unet, before.vae.encoder) == fingerprint(after.unet, after.vae.encoder)
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = (before.vae.decode(latents).sample - after.vae.decode(latents).sample).abs().max()
    assert moved > 1e-3
    again = tiny_pretrain(f"start={first / 'teacher'}", "teacher_images=0")  # the first one's decoder is left behind
    pretrain.run_pretrain(str(tmp_path / "pictures"), again, None, second, console=paper())
    kept = DiffusionPipeline.from_pretrained(second / "teacher")
    assert fingerprint(kept.vae) == fingerprint(after.vae)


def test_the_teachers_timesteps_are_the_recipes(monkeypatch, tmp_path):
    shares = []
    monkeypatch.setattr(
        "onestroke.embedded.pretrain.Denoising",
        lambda model, settings, **kwargs: shares.append(settings.uniform_share) or Denoising(model, settings, **kwargs),
    )
    write_comicset(tmp_path / "pictures", count=40, size=32)
    recipe = tiny_pretrain("uniform_timesteps=0.6")
    pretrain.run_pretrain(str(tmp_path / "pictures"), recipe, None, tmp_path / "out", console=paper())
    assert shares == [0.6]
    with pytest.raises(CheckpointError, match="uniform_timesteps: 0.6 -> 0.3"):
        pretrain.run_pretrain(str(tmp_path / "pictures"), tiny_pretrain(), None, tmp_path / "out", console=paper())


def test_a_stage_stops_at_the_first_saving_past_its_time():
    times = iter([4.0, 6.0])
    log = pretrain.stage_log("vae", 5.0, paper(), clock=lambda: next(times))
    log("100 pictures")
    with pytest.raises(pretrain.OutOfTime):
        log("200 pictures")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(("--size", "100"), "multiple of 16"), (("--set", "teacher_image=3"), "Did you mean 'teacher_images'?")],
)
def test_pretrain_refuses_bad_settings_in_one_line(arguments, part, monkeypatch, capsys):
    status, _, error = onestroke("pretrain", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert status == 1 and part in error and error.count("\n") == 1


# doctor


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


# bench


def test_bench_times_the_step_and_its_parts_and_leaves_the_player_trainable(weights, monkeypatch):
    trainers = []
    build = bench.add_trainer
    monkeypatch.setattr(bench, "add_trainer", lambda *a: trainers.append(build(*a)) or trainers[0])
    times = bench.measure_step(load_recipe("mini", ["train.batch_size=2"]), rounds=2)
    assert set(bench.MAIN_PARTS) | {bench.STEP} <= times.keys()
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    assert min(times[bench.STEP]) > min(times["text encoders"])
    assert trainers[0].step == 2 + bench.WARM_UPS
    for player in trainers[0].method.players.values():
        assert all(parameter.grad is None and parameter.requires_grad for parameter in player.module.parameters())


def test_the_steps_ratio_is_taken_within_the_round():
    times = {bench.STEP: [3.0, 30.0, 9.0], "a": [1.0, 10.0, 1.0], "b": [1.0, 10.0, 2.0]}
    assert bench.step_over(times, ["a", "b"]) == 1.5  # of 1.5, 1.5 and 3


def test_bench_train_step_prints_both_ratios(monkeypatch):
    parts = {bench.STEP: [0.2], **{name: [0.025] for name in bench.MAIN_PARTS}, "text encoders": [0.075]}
    monkeypatch.setattr(bench, "measure_step", lambda recipe, *, rounds: parts)
    console = paper()
    bench.run_train_step(4, 1, console)
    printed = text_of(console)
    assert "125 ms" in printed and "200 ms" in printed  # the sums
    assert "step / the first five parts: 1.60" in printed and "step / all parts: 1.00" in printed


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


# the process


@pytest.mark.parametrize("fill", [lambda: torch.empty(1 << 50), lambda: [0] * (1 << 60)])
def test_a_machine_without_room_is_one_line_that_says_what_to_change(fill, monkeypatch, capsys):
    """What PyTorch's CPU allocator and Python themselves raise."""
    monkeypatch.setattr(cli, "app", lambda **how: fill())
    with pytest.raises(SystemExit) as exited:
        cli.main()
    errors = capsys.readouterr().err
    assert exited.value.code == 1 and errors.count("\n") == 1
    assert errors.startswith("onestroke: the device has no room. Lower train.micro_batch_size")


def test_the_command_exits_with_one_line_and_status_1(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "onestroke", "distill", "sdxl-anime", "--data", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("onestroke: ") and result.stderr.count("\n") == 1 and "--teacher" in result.stderr


def test_errors_of_commands_are_the_users_kind():
    with pytest.raises(OnestrokeError):
        generate.check_order("", Path("a.png"))


@pytest.mark.parametrize(
    ("seconds", "count"),
    [(0.05, demo.DEMO_IMAGES), (0.25, 260), (0.333, 200), (2.0, demo.FEWEST_IMAGES)],  # half as many again for spread
)
def test_a_demo_draws_as_many_pictures_as_there_is_time_for(seconds, count):
    assert demo.images_within(100.0, seconds) == count


def test_a_demo_times_a_picture_by_every_way(monkeypatch):
    clock = iter([0.0, 8.0, 10.0, 14.0, 20.0, 24.0])
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    drawn = []
    way = Way("key", 1, lambda prompts, seeds: drawn.append(len(prompts)))
    assert demo.seconds_a_picture(Ways({1: way, 4: way}, {1: way})) == 1.0  # 16 s for 16 pictures by all three
    assert drawn == [16, 16, 16]


def test_a_demo_with_time_has_anchors_and_one_that_goes_on_keeps_what_it_began_with(tmp_path):
    def anchors(out, minutes: float) -> tuple[int, int]:
        recipe = demo.demo_recipe(out, minutes=minutes, seed=3)
        assert recipe.seed == 3
        return recipe.anchors.count, recipe.anchors.images

    assert anchors(tmp_path, 1) == (0, 0) and anchors(tmp_path, 10) == (1000, 4000)
    for folder in ("short", "long/anchoring", "longer"):
        (tmp_path / folder).mkdir(parents=True)
    save_recipe(demo.demo_recipe(tmp_path, minutes=1, seed=3), tmp_path / "short" / "recipe.yaml")
    assert anchors(tmp_path / "short", 30) == (0, 0)
    begun = demo.demo_recipe(tmp_path, minutes=10, seed=3)
    for folder in ("long/anchoring", "longer"):  # killed before ADD, or in it
        save_recipe(begun, tmp_path / folder / "recipe.yaml")
    assert anchors(tmp_path / "long", 30) == anchors(tmp_path / "longer", 30) == (1000, 4000)
    assert demo.demo_recipe(tmp_path / "long", minutes=30, seed=3) == begun
