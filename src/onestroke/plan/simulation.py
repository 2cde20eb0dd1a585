"""One training step on fake tensors: the real method's own code, run for its shapes, bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from onestroke.config import Recipe
from onestroke.distill.add import ADD, DISCRIMINATOR, STUDENT
from onestroke.distill.crops import Crops
from onestroke.distill.frozen import float8_bytes
from onestroke.divided import threads_for
from onestroke.plan.architecture import Architecture
from onestroke.plan.tracker import Tracker, cuda_casts
from onestroke.plan.untrained import Parts, materialise, untrained_method
from onestroke.precision import training_attention
from onestroke.types import Batch

LATENTS, IMAGE_EMBEDDINGS, TEXT_EMBEDDINGS = "encode pictures", "image embeddings", "text embeddings"
ENCODED_ONCE = (LATENTS, IMAGE_EMBEDDINGS, TEXT_EMBEDDINGS)  # parts that `onestroke encode` does before training
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Simulation:
    """What one micro-batch needs. Bytes are above the weights and their gradients."""

    weights: Mapping[str, int]  # bytes, by network
    trained: Mapping[str, int]  # parameters, by player
    activations: int  # bytes, at the peak of one micro-batch
    micro_batch: int  # pictures
    operations: Mapping[str, int]  # floating-point operations a picture, by part; recomputation included
    recomputed: int  # of them, those that are done a second time to save memory, a picture
    gradient_sets: int = 1  # that are there at once; of threads that share a batch, each has its own


def simulate(recipe: Recipe, architecture: Architecture, *, device: str = "cpu") -> Simulation:
    """Simulate a step of `recipe` on "cpu" or "cuda" (which differ in what autocast leaves in float32).

    Raises the errors that the recipe's own parts raise. Takes up to minutes of one core, and little memory.
    """
    micro_batch = min(recipe.train.micro_batch_size or recipe.train.batch_size, recipe.train.batch_size)
    method, networks = parts = untrained_method(recipe, architecture, device="meta")
    weights = bytes_by_network(parts)
    trained = {name: sum(p.numel() for p in player.module.parameters()) for name, player in method.players.items()}
    slots = torch.arange(micro_batch)
    tracker = Tracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        modules = [module for part in networks.values() for module in part]
        modules += [player.module for player in method.players.values()]  # an adapter's own list of its weights
        materialise(modules)
        for module in modules:
            tracker.know(*module.parameters(), *module.buffers())
        batch = _batch(recipe, slots)
        _watch(method, tracker, recipe)
        gradients = sum(4 * count for count in trained.values())
        if micro_batch < recipe.train.batch_size:
            start_gradients(method, tracker)
            gradients = 0
        with cuda_casts() if device == "cuda" else nullcontext(), tracker:
            run_micro_batch(method, batch, AUTOCAST.get(recipe.train.precision), tracker, device=device)
    operations = {name: count // micro_batch for name, count in tracker.operations.items()}
    activations = max(0, tracker.peak - gradients)
    divides = device == "cpu" and not recipe.train.compile and recipe.train.micro_batch_size is None
    sets = threads_for(micro_batch) if divides else 1
    return Simulation(weights, trained, activations, micro_batch, operations, tracker.recomputed // micro_batch, sets)


def start_gradients(method: ADD, tracker: Tracker) -> None:
    """Gradients as they stand after a first micro-batch, which the second one finds in memory; not counted."""
    for player in method.players.values():
        for parameter in player.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
            tracker.know(parameter.grad)


def run_micro_batch(
    method: ADD, batch: Batch, dtype: torch.dtype | None, tracker: Tracker, *, device: str = "cpu"
) -> None:
    """Rollout, and both losses with their gradients, as the trainer takes them."""
    due = frozenset(method.players)
    autocast = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with autocast, training_attention(device, batch.num_pixels):
        with tracker.part("other"):
            rollout = method.rollout(batch, due)
        for name in sorted(due):
            for other, player in method.players.items():
                player.module.requires_grad_(other == name)
            with tracker.part({DISCRIMINATOR: "heads", STUDENT: "backward to the student"}[name]):
                loss = method.loss(name, rollout)
                with torch.autocast("cpu", enabled=False):
                    loss.total.backward(retain_graph=name != max(due))
    for player in method.players.values():
        player.module.requires_grad_(True)


def _watch(method: ADD, tracker: Tracker, recipe: Recipe) -> None:
    """Name the parts of the rollout, and crop at the corner: fake numbers have no value to crop at."""

    def named(name, call):
        def inside(*args, **kwargs):
            with tracker.part(name):
                return call(*args, **kwargs)

        return inside

    def at_the_corner(size: Sequence[int], slots: Tensor, stream: str) -> Crops | None:
        share = recipe.discriminator.crop
        height, width = (max(1, round(share * side)) for side in size)
        return None if share == 1 else Crops([0] * len(slots), [0] * len(slots), height, width)

    method._crops = at_the_corner  # pyright: ignore
    for module, name in (
        (method.student, "student forward"),
        (method.teacher, "teacher"),
        (method.features, "features"),
    ):
        module.forward = named(name, module.forward)
    method.features.forward_and_embed = named("features", method.features.forward_and_embed)
    method.decode._decoded = named("decode", method.decode._decoded)
    model = method.model
    model.encode_images = named(LATENTS, model.encode_images)
    model.encode_prompts = named("text encoders", model.encode_prompts)
    settings = recipe.discriminator
    may_keep = settings.crop == 1 and settings.real == "data"  # else each showing has its own embedding
    image = IMAGE_EMBEDDINGS if may_keep else "features"
    text = "text encoders" if settings.text_encoder == "teacher" else TEXT_EMBEDDINGS
    method.embed_image.forward = named(image, method.embed_image.forward)
    method.embed_text.forward = named(text, method.embed_text.forward)


def _batch(recipe: Recipe, slots: Tensor) -> Batch:
    count, size = len(slots), recipe.data.size
    images = torch.empty(count, 3, size, size)
    return Batch(images, ("a picture",) * count, slots, torch.zeros(count, 4, dtype=torch.long))


def bytes_by_network(parts: Parts) -> dict[str, int]:
    """Of parameters and buffers; what two networks share counts with the first, and a float8 teacher as it will be."""
    seen: set[int] = set()
    found = {}
    for name, modules in parts.networks.items():
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if id(t) not in seen]
        found[name] = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
        seen |= {id(t) for t in tensors}
    if parts.method.recipe.teacher.fp8 != "none":
        found["teacher UNet"] = float8_bytes(parts.method.model.unet)
    return found
