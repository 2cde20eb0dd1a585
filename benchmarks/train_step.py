"""The ADD step of onestroke beside the plain one that public trainers take: pictures a second, and memory.

    python benchmarks/train_step.py                                        # the embedded recipe, on any machine
    python benchmarks/train_step.py --architecture sdxl --size 512 --batch 4 --compile      # random weights, on a GPU

Variants take their steps in turn, on the same weights and optimizers; medians over rounds, and of each round's ratio.
Memory is that above the loaded models at the highest point, gradients included: on a GPU what PyTorch allocates; on a
CPU the resident set of a fresh process for each variant.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.compiler import compile_blocks
from onestroke.config import DecodeRecipe, load_recipe, recipe_from
from onestroke.distill.add import DISCRIMINATOR, STUDENT, Rollout
from onestroke.distill.decoding import Decoder
from onestroke.distill.student import choose_timesteps
from onestroke.embedded import weights_folder
from onestroke.evaluate.latency import peak_memory
from onestroke.operations import CPU_FORMULAS
from onestroke.plan.architecture import architecture_of
from onestroke.plan.untrained import untrained_method
from onestroke.precision import autocast_dtype, named_frozen_precision
from onestroke.randomness import normal, uniform
from onestroke.train.trainer import Trainer, TrainSettings, _average, _clip, ema_decay
from onestroke.train.views import Views
from onestroke.types import Batch

RECIPES = {"sdxl": "sdxl-anime", "sd15": "sd15"}  # of architectures; mini's settings for all others
PEAK = 989e12  # bfloat16 operations a second of an H100 or H200, dense


def plain_step(trainer: Trainer, batch: Batch) -> None:
    """ADD as a public trainer takes it: each player in turn, with a student pass and a whole decode of its own."""
    method, recipe, device = trainer.method, trainer.method.recipe, trainer.method.model.device
    model, heads, pixel = method.model, method.heads, recipe.losses.distance == "pixel"
    autocast = torch.autocast(device.type, trainer.settings.autocast or torch.bfloat16,
                              enabled=trainer.settings.autocast is not None)  # fmt: skip

    def looked_at(images: torch.Tensor, stream: str) -> torch.Tensor:
        crops = method._crops(images.shape[-2:], batch.slots, stream)
        return images if crops is None else crops.of(images)

    with torch.no_grad(), autocast:  # what both players are given
        images = batch.images.to(device)
        latents, condition = model.encode_images(images), method._condition(batch)
        s = choose_timesteps(uniform(0, "s", batch.slots), recipe.student, num_train_timesteps=len(model.schedule))
        x_s = model.schedule.student_input(latents, normal(latents.shape[1:], 0, "eps", batch.slots).to(latents), s)
        shown = model.decode_latents(latents) if recipe.discriminator.real == "reconstructed" else images
        real = looked_at(shown, "real")
        c_text = method.embed_text(batch.captions, condition) if heads.uses_text else None
        c_img = method.embed_image(real) if heads.uses_image else None
    for name in (DISCRIMINATOR, STUDENT):
        method.players[STUDENT].module.requires_grad_(name == STUDENT)
        heads.requires_grad_(name == DISCRIMINATOR)
        with autocast:
            with torch.set_grad_enabled(name == STUDENT):
                x0 = method.student(x_s, s.to(device), condition)
                pixels = model.decode_latents(x0)
                fake = method.features(looked_at(pixels, "fake"))
                target = method._target(x0, condition, batch) if name == STUDENT else None
            seen = None
            if name == DISCRIMINATOR:
                with torch.no_grad():
                    seen = method.features(real)
            rollout = Rollout(pixels if pixel else x0, fake, seen, target, c_text, c_img,
                              (s != len(model.schedule) - 1).to(device), method._r1_gamma(batch))  # fmt: skip
            loss = method.loss(name, rollout).total
        loss.backward()
        player, optimizer = method.players[name], trainer.optimizers[name]
        _clip(player)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    student = method.players[STUDENT]
    _average(trainer.averages[STUDENT], student.module, ema_decay(student.ema_images, 10**6, len(batch)))
    method.heads.advance_spectral_norm()


@dataclass(frozen=True)
class Variant:
    """One way to take a step; `micro_batch` None is the whole batch."""

    label: str
    is_plain: bool = False
    chunk: int | None = None
    scale: float = 1.0
    is_tiny: bool = False  # decoded by a tiny autoencoder
    micro_batch: int | None = None
    checkpointing: bool = False


def variants_of(batch: int) -> dict[str, Variant]:
    half, quarter = max(1, batch // 2), max(1, batch // 4)
    return {
        "plain": Variant("plain: a pass for each player", is_plain=True),
        "onestroke": Variant("onestroke"),
        "chunk": Variant(f"decode.chunk {quarter}", chunk=quarter),
        "scale": Variant("decode.scale 0.5", scale=0.5),
        "tiny": Variant("decode.autoencoder", is_tiny=True),
        "lean": Variant(f"lean: micro_batch_size {half}, decode.chunk {quarter}", micro_batch=half, chunk=quarter),
        "leanest": Variant("leanest: micro_batch_size 1, gradient_checkpointing", micro_batch=1,
                           checkpointing=True),
    }  # fmt: skip


class Bench:
    """Untrained networks of one architecture, on which any variant takes its steps."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        name = RECIPES.get(arguments.architecture, "mini")
        where = str(weights_folder() / "teacher") if arguments.architecture == "embedded" else arguments.architecture
        settings = [f"train.batch_size={arguments.batch}", f"data.size={arguments.size}", "train.num_images=100000000",
                    "student.gradient_checkpointing=false", "decode.autoencoder=untrained"]  # fmt: skip
        recipe = load_recipe(name, [*settings, *arguments.set])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        frozen = named_frozen_precision(recipe.train.frozen_precision, recipe.train.precision, self.device)
        recipe = recipe_from(recipe.model_dump(), [f"train.frozen_precision={frozen}"])
        self.method = untrained_method(recipe, architecture_of(where), device=self.device).method
        self.tiny, autocast = self.method.decode.tiny, autocast_dtype(recipe.train.precision, self.device)
        settings = TrainSettings(10**8, arguments.batch, None, autocast)
        self.trainer = Trainer(self.method, settings)
        self.blocks = _compile(self.method) if arguments.compile else {}
        count, size = arguments.batch, arguments.size
        images, slots = torch.rand(count, 3, size, size) * 2 - 1, torch.arange(count, 2 * count)
        self.batch = Batch(images, ("a person",) * count, slots, torch.tensor([[size, size, 0, 0]] * count))
        self.views: dict[Variant, Views] = {}
        self._start_optimizers()

    def step(self, variant: Variant) -> None:
        """One step, weights changed."""
        unet = self.method.players[STUDENT].module
        (unet.enable_gradient_checkpointing if variant.checkpointing else unet.disable_gradient_checkpointing)()
        for block, compiled in self.blocks.items():
            block._compiled_call_impl = None if variant.is_plain else compiled
        margin = self.method.recipe.decode.margin
        recipe = DecodeRecipe(chunk=variant.chunk, scale=variant.scale, margin=margin)
        self.method.decode = Decoder(self.method.model, recipe)
        self.method.decode.tiny = self.tiny if variant.is_tiny else None
        self.trainer.settings = replace(self.trainer.settings, micro_batch_size=variant.micro_batch)
        self.trainer.views = self.views.setdefault(variant, Views(self.method, divides=variant.micro_batch is None))
        plain_step(self.trainer, self.batch) if variant.is_plain else self.trainer._step(self.batch)

    def seconds(self, variant: Variant) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        self.step(variant)
        wait()
        return time.perf_counter() - started

    def operations(self) -> int:
        """Of one step without recomputation, by PyTorch's counter, which sees its own thread alone."""
        counter, threads = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS), torch.get_num_threads()
        torch.set_num_threads(1)
        with counter:
            self.step(Variant("counted"))
        torch.set_num_threads(threads)
        return counter.get_total_flops()

    def memory(self, variant: Variant) -> int | None:
        """Bytes above the loaded models and optimizer states at the highest point of two steps."""
        gc.collect()
        before = peak_memory(lambda: None, self.device)
        peak = peak_memory(lambda: [self.step(variant) for _ in range(2)], self.device)
        return None if peak is None or before is None else peak - before

    def _start_optimizers(self) -> None:
        """Their states belong to what is loaded."""
        for name, player in self.method.players.items():
            for parameter in player.module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.trainer.optimizers[name].step()
            self.trainer.optimizers[name].zero_grad(set_to_none=True)


def _compile(method) -> dict:
    """The blocks that `train.compile` compiles, with what a compiled call is."""
    networks = [method.players[STUDENT].module, *method.frozen]
    compile_blocks(networks)
    modules = [module for network in networks for module in network.modules()]
    return {m: m._compiled_call_impl for m in modules if m._compiled_call_impl is not None}


def memory_in_a_fresh_process(name: str) -> int | None:
    """As `Bench.memory`; an allocator that hands large blocks back, so that the resident set is what is in use."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: the process for its memory failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="embedded", help="embedded, sdxl, sd15, or a diffusers folder")
    parser.add_argument("--size", type=int, help="pixels a side; 128 for the embedded recipe, else 512")
    parser.add_argument("--batch", type=int, help="16 for the embedded recipe, else 4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--variants", default="plain,onestroke,lean", help="of plain, onestroke, chunk, scale, tiny, lean, leanest"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks of onestroke's UNets")
    parser.add_argument("--set", action="append", default=[], help="override a recipe key: section.key=value")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_embedded = arguments.architecture == "embedded"
    arguments.size = arguments.size or (128 if is_embedded else 512)
    arguments.batch = arguments.batch or (16 if is_embedded else 4)
    quiet_libraries()
    use_machine()
    known = variants_of(arguments.batch)
    names = arguments.variants.split(",")
    if not set(names) <= set(known):
        parser.error(f"--variants: choose from {', '.join(known)}")
    bench = Bench(arguments)
    if arguments.memory_of:
        print(json.dumps(bench.memory(known[arguments.memory_of])))
        return
    report(measure(bench, {name: known[name] for name in names}, arguments), arguments)


def measure(bench: Bench, variants: dict[str, Variant], arguments: argparse.Namespace) -> dict:
    """Figures of every variant, by name; ratios are to the first."""
    first, is_gpu = next(iter(variants)), bench.device.type == "cuda"
    if is_gpu:
        memory = {name: bench.memory(variant) for name, variant in variants.items()}
    else:
        with ThreadPoolExecutor(4) as pool:  # what a process holds does not depend on its neighbours
            memory = dict(zip(variants, pool.map(memory_in_a_fresh_process, variants), strict=True))
    for variant in variants.values():  # warm
        bench.step(variant)
    operations = bench.operations()
    rounds, names = [], list(variants)
    for k in range(arguments.rounds):
        order = names[k % len(names) :] + names[: k % len(names)]
        rounds.append({name: bench.seconds(variants[name]) for name in order})
    rows = {}
    for name, variant in variants.items():
        seconds = median(r[name] for r in rounds)
        rows[name] = {
            "label": variant.label, "pictures_a_second": arguments.batch / seconds,
            "speed_ratio": median(r[first] / r[name] for r in rounds),
            "memory_mib": None if memory[name] is None else memory[name] / 2**20,
            "memory_ratio": None if memory[name] is None or not memory[first] else memory[name] / memory[first],
            "operations_a_second": operations / seconds,
        }  # fmt: skip
    device = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU threads"
    return {"device": device, "architecture": arguments.architecture, "size": arguments.size, "batch": arguments.batch,
            "rounds": arguments.rounds, "tera_operations_a_step": operations / 1e12, "variants": rows}  # fmt: skip


def report(figures: dict, arguments: argparse.Namespace) -> None:
    print(f"{figures['architecture']} at {figures['size']} px, batch {figures['batch']}, {figures['device']}, "
          f"{figures['rounds']} rounds; {figures['tera_operations_a_step']:.3f} tera-operations a step")  # fmt: skip
    print(f"{'':66} pictures/s  speed    memory  of plain" + ("   MFU" if torch.cuda.is_available() else ""))
    for row in figures["variants"].values():
        memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:,.0f} MiB"
        share = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        mfu = f"  {row['operations_a_second'] / PEAK:.0%}" if torch.cuda.is_available() else ""
        print(
            f"{row['label']:66} {row['pictures_a_second']:10.2f} {row['speed_ratio']:5.2f}x "
            f"{memory:>11} {share:>8}{mfu}"
        )
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
