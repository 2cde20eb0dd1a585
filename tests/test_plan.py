"""What a plan says beside real networks and a real step: weights, bytes at the peak, operations; its command."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import yaml
from pipelines import tiny_sd, tiny_sdxl
from tiny_runs import tiny_batch, tiny_recipe
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from onestroke.cli import app
from onestroke.distill.add import ADD
from onestroke.distill.features import load_features
from onestroke.distill.student import build_student
from onestroke.errors import ModelError, RecipeError
from onestroke.export import export_folder
from onestroke.families.load import load_model
from onestroke.operations import CPU_FORMULAS
from onestroke.plan.architecture import architecture_of
from onestroke.plan.devices import DEVICES, device_called
from onestroke.plan.estimate import (
    advice,
    cache_line,
    checkpoint_bytes,
    estimate,
    memory_by_part,
    uncounted_line,
)
from onestroke.plan.simulation import AUTOCAST, run_micro_batch, simulate, start_gradients
from onestroke.plan.tracker import Tracker, cuda_casts
from onestroke.single_file_export import save_single_file
from onestroke.train.trainer import Trainer, TrainSettings

PLANNED = ("train.precision=bfloat16", "train.device=cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_folder(tiny_sdxl("v_prediction"), tmp_path_factory.mktemp("model") / "teacher")


def real_trainer(folder, recipe):
    """As build.add_trainer makes it, with the weights."""
    teacher = load_model(folder)
    student = build_student(teacher, recipe.student, seed=0)
    for module in (teacher.unet, teacher.vae, student):
        module.to(memory_format=torch.channels_last)
    method = ADD(teacher, student, load_features("efficientnet-lite0"), recipe)
    settings = TrainSettings(1000, 4, recipe.train.micro_batch_size, AUTOCAST.get(recipe.train.precision))
    return Trainer(method, settings)


@cache
def planned(folder, *lines):
    """The simulation of a tiny recipe; tests share it."""
    recipe = tiny_recipe(*PLANNED, *lines)
    return recipe, simulate(recipe, architecture_of(str(folder)))


class NoModules(nullcontext):
    """In place of `FlopCounterMode`'s tracker of modules, whose hooks R1's `autograd.grad` does not bear."""

    parents = ("Global",)


def size_of(*modules):
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


def test_weights_and_trained_parameters_are_those_of_the_real_networks(folder):
    recipe, simulation = planned(folder)
    method = real_trainer(folder, recipe).method
    model = method.model
    assert simulation.weights == {
        "teacher UNet": size_of(model.unet), "VAE": size_of(model.vae),
        "text encoders": size_of(*model.text_encoders), "feature networks": size_of(method.features),
        "student": size_of(method.student.unet), "heads": size_of(method.heads),
    }  # fmt: skip
    for name, player in method.players.items():
        assert simulation.trained[name] == sum(p.numel() for p in player.module.parameters())


@pytest.mark.parametrize("lines", [
    (), ("decode.chunk=1",), ("student.gradient_checkpointing=true", "train.micro_batch_size=2"),
    ("train.precision=float32", "losses.distance=latent", "discriminator.crop=0.75",
     "discriminator.real=reconstructed"),
], ids=["default", "chunks", "checkpointing", "float32 and crops"])  # fmt: skip
def test_the_peak_and_the_operations_are_those_of_a_real_step(folder, lines):
    recipe, simulation = planned(folder, *lines)
    trainer = real_trainer(folder, recipe)
    method, count = trainer.method, recipe.train.micro_batch_size or 4
    tracker = Tracker()
    parts = (method.model.unet, method.model.vae, *method.model.text_encoders, method.features)
    for module in (*parts, *(player.module for player in method.players.values())):
        tracker.know(*module.parameters(), *module.buffers())
    accumulates = count < 4
    if accumulates:
        start_gradients(method, tracker)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
    counter.mod_tracker = NoModules()
    with counter, tracker:
        run_micro_batch(method, tiny_batch(count), AUTOCAST.get(recipe.train.precision), tracker)
    trained = [p for player in method.players.values() for p in player.module.parameters()]
    gradients = 0 if accumulates else sum(p.grad.numel() * p.grad.element_size() for p in trained)
    assert simulation.micro_batch == count
    assert simulation.activations == pytest.approx(tracker.peak - gradients, rel=0.1)
    assert sum(simulation.operations.values()) * count == pytest.approx(counter.get_total_flops(), rel=0.001)


def test_saving_memory_shows_and_its_price_does_too(folder):
    lines = ((), ("decode.chunk=1",), ("student.gradient_checkpointing=true",))
    plain, chunk, blocks = (planned(folder, *given)[1] for given in lines)
    assert chunk.activations < plain.activations > blocks.activations
    assert plain.recomputed == 0 < min(chunk.recomputed, blocks.recomputed)
    once = [sum(s.operations.values()) - s.recomputed for s in (plain, chunk, blocks)]
    assert once[1:] == [pytest.approx(once[0], rel=1e-3)] * 2


@pytest.mark.usefixtures("two_threads")
def test_threads_that_share_a_batch_have_gradients_of_their_own(folder):
    for sets, line in ((2, "train.batch_size=8"), (1, "train.micro_batch_size=8"), (1, "train.compile=true")):
        recipe, simulation = planned(folder, "train.batch_size=16", line)
        assert simulation.gradient_sets == sets
        assert memory_by_part(recipe, simulation)["gradients"] == sets * 4 * sum(simulation.trained.values())


def test_a_lora_student_costs_its_adapter_alone(folder):
    pytest.importorskip("peft")
    full, lora = planned(folder)[1], planned(folder, "student.lora.rank=2")[1]
    adapter = lora.trained["student"]
    assert adapter < 0.2 * full.trained["student"]
    assert lora.weights["student"] == 4 * adapter and lora.weights["teacher UNet"] == full.weights["teacher UNet"]


def test_attention_on_a_cpu_is_counted_by_the_tracker_and_by_pytorchs_counter():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (16, 5, 5))
    counter, tracker = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS), Tracker()
    with counter, tracker:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    forward = 2 * 2 * 3 * 2 * 16 * 5 * 8  # two products of 16 x 8 by 8 x 5, a multiply-add being two, in 2 x 3 heads
    assert sum(tracker.operations.values()) == counter.get_total_flops() == pytest.approx(3.5 * forward)


def test_norms_keep_float32_on_a_gpu():
    before = torch.nn.functional.group_norm
    norm, x = torch.nn.GroupNorm(2, 4), torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), cuda_casts():
        assert norm(x).dtype == torch.float32
    assert norm.to(torch.bfloat16)(x).dtype == torch.bfloat16
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.GroupNorm(2, 4))
    with torch.autocast("cpu", torch.bfloat16), cuda_casts():  # and where the block is computed again
        torch.utils.checkpoint.checkpoint(block, x.float(), use_reentrant=False).square().sum().backward()
    assert block[0].weight.grad is not None and torch.nn.functional.group_norm is before


def test_sdxls_published_sizes_come_out_without_a_weight():
    with torch.device("meta"):
        model = architecture_of("sdxl").untrained()
    counts = [sum(p.numel() for p in m.parameters()) for m in (model.unet, model.vae, *model.text_encoders)]
    assert counts == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]


def test_an_architecture_is_read_from_a_folder_a_checkpoint_and_a_name(folder, tmp_path):
    def shapes(source):
        with torch.device("meta"):
            model = architecture_of(str(source)).untrained()
        return {name: tuple(p.shape) for name, p in model.unet.named_parameters()}, model.family.name

    real = load_model(folder)
    expected = {name: tuple(p.shape) for name, p in real.unet.named_parameters()}
    assert shapes(folder) == (expected, "sdxl")
    assert shapes(save_single_file(tiny_sd(), tmp_path / "x.safetensors"))[1] == "sd"
    assert architecture_of("sd15").family.name == "sd"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no configs of an SDXL or SD model") as caught:
        architecture_of(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)


def test_memory_and_time_are_worked_out_as_by_hand(folder):
    recipe = tiny_recipe(*PLANNED, "train.num_images=40", "student_optimizer.kind=muon")
    simulation = planned(folder)[1]
    student, heads = simulation.trained["student"], simulation.trained["discriminator"]
    eight = tiny_recipe(*PLANNED, "student_optimizer.kind=adamw8bit")  # a byte a moment, and 4 for the scale of 256
    assert memory_by_part(eight, simulation)["optimizer states"] == round(2 * (1 + 4 / 256) * student) + 8 * heads
    memory = memory_by_part(recipe, simulation)
    assert memory["gradients"] == 4 * (student + heads)
    assert memory["optimizer states"] == 4 * (student + 2 * heads)  # Muon's one, Adam's two
    assert memory["student's average"] == 4 * student
    assert checkpoint_bytes(recipe, simulation) == 4 * (student + heads) + 4 * (student + 2 * heads) + 4 * student
    found = estimate(recipe, simulation, device=None, step_seconds=2.0)
    assert (found.num_steps, found.pictures_an_hour, found.hours) == (10, 7200, 20 / 3600)
    assert found.total_memory == round(1.05 * sum(memory.values()))
    gpu = DEVICES["h100-80gb"]
    two, one = (estimate(recipe, simulation, device=gpu, count=n).step_seconds for n in (2, 1))
    assert one == 2 * two == pytest.approx(4 * sum(simulation.operations.values()) / (0.35 * 989e12))


def test_advice_comes_only_where_it_does_not_fit_and_names_no_line_that_is_set(folder):
    recipe, simulation = planned(folder, "decode.chunk=1")
    found = estimate(recipe, simulation, device=None, step_seconds=1.0)
    assert advice(recipe, found, simulation, 2**40) == []
    lines = advice(recipe, found, simulation, 2**20)
    assert [line.split("=")[0] for line in lines[:3]] == [
        "student_optimizer.kind", "student.gradient_checkpointing", "train.micro_batch_size",
    ]  # fmt: skip
    saved = (8 - 2 * (1 + 4 / 256)) * simulation.trained["student"]
    for room, fits in ((found.total_memory - saved, True), (found.total_memory - 1.1 * saved, False)):
        assert ("with which it fits" in advice(recipe, found, simulation, int(room))[0]) == fits
    with pytest.raises(RecipeError, match="h100-80gb"):
        device_called("h900")


def test_a_plan_says_when_encoding_once_pays(folder):
    recipe, simulation = planned(folder, "data.source=FOLDER", "train.num_images=900")
    latents, total = simulation.operations["encode pictures"], sum(simulation.operations.values())
    assert latents > 0
    spared = simulation.operations.get("image embeddings", 0) + latents
    line = cache_line(recipe, simulation)
    assert f"spares {spared / total:.0%}" in line and "fewer than 900 pictures" in line
    flipped = tiny_recipe("data.source=FOLDER", "train.num_images=900", "data.random_flip=true", "data.crop=random",
                          "data.crops_per_image=3")  # fmt: skip
    assert "6 times" in cache_line(flipped, simulation) and "fewer than 150 pictures" in cache_line(flipped, simulation)
    endless = tiny_recipe("data.source=FOLDER", "data.crop=random")
    assert "crops_per_image" in cache_line(endless, simulation)
    assert cache_line(tiny_recipe("data.source=comicset"), simulation) is None


def test_what_an_estimate_leaves_out_is_named():
    assert uncounted_line(tiny_recipe()) is None
    anchored = tiny_recipe("anchors.count=8000", "anchors.images=9000", "anchors.steps=8")
    assert uncounted_line(anchored) == (
        "not in these hours: 8,000 pictures that the teacher draws in 8 steps; "
        "9,000 showings of those to the student alone"
    )
    sharpened = tiny_recipe("sharpen.images=14000", "sharpen.later_every=3")
    assert uncounted_line(sharpened) == "not in these hours: 14,000 prompts of sharpening, 2 predictions each"


def test_the_command_plans_a_gpu_and_measures_this_machine(folder, tmp_path):
    tree = {"teacher": {"source": str(folder)}, "train": {"device": "cpu", "batch_size": 2, "num_images": 20,
            "sample_images": 0}, "data": {"size": 32}}  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    for options in (["--device", "h100-80gb", "--count", "8"], []):
        done = CliRunner().invoke(app, ["plan", str(recipe), *options])
        assert done.exit_code == 0, done.output
        assert "teacher UNet, weights" in done.output and "pictures an hour; 10 steps" in done.output
        assert "on the disk, and in memory while it is written" in done.output
        assert ("assumed 35%" in done.output) == bool(options)
        assert ("measured on this machine" in done.output) != bool(options)
