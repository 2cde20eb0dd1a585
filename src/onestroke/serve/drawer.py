"""A diffusers pipeline as the server uses it: a batch of orders in, a batch of pictures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, SchedulerMixin

from onestroke.divided import num_parts
from onestroke.sample import as_bytes, begin_drawing
from onestroke.serve.loras import Wardrobe
from onestroke.serve.order import Limits, Notice, Order, RequestError, Start

NOTED_PROMPTS = 1024  # whose notices are remembered


@dataclass(frozen=True)
class Canvas:
    """The sizes that a model draws well."""

    default: int  # pixels a side
    multiple: int  # that both sides divide by
    square_only: bool = False  # a model that only ever saw its default size

    def snap(self, size: tuple[int, int], *, max_pixels: int) -> tuple[int, int]:
        """The nearest height and width that the model draws: half to twice its default side, in its multiples."""
        if self.square_only:
            return (self.default, self.default)
        height, width = (min(max(side, self.default // 2), 2 * self.default) for side in size)
        shrink = min(1.0, (max_pixels / (height * width)) ** 0.5)
        height, width = (max(self.multiple, _nearest(side * shrink, self.multiple)) for side in (height, width))
        while height * width > max_pixels and max(height, width) > self.multiple:
            height, width = (height - self.multiple, width) if height >= width else (height, width - self.multiple)
        return (height, width)


def canvas_of(pipeline: DiffusionPipeline, *, square_only: bool = False) -> Canvas:
    """What the UNet was trained at, and what its downsampling divides."""
    scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    levels = len(pipeline.unet.config.block_out_channels) - 1
    return Canvas(pipeline.unet.config.sample_size * scale, max(8, scale * 2**levels), square_only)


def num_bytes_of(pipeline: DiffusionPipeline) -> int:
    """Of its weights in memory."""
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class Drawer:
    """One model of the server. `draw` is for the worker thread alone, everything else for the event loop."""

    def __init__(
        self,
        name: str,
        pipeline: DiffusionPipeline,
        *,
        steps: int = 1,
        guidance: float = 0.0,
        square_only: bool = False,
        unknown_words: Callable[[str], list[str]] | None = None,
        phrases: Sequence[str] = (),
        loras: Mapping[str, Path] | None = None,
        reload: Callable[[], DiffusionPipeline] | None = None,
    ) -> None:
        """`steps`: where a request names none. `unknown_words`: of a prompt, where the model's vocabulary is known.
        `phrases`: completions of a prompt. `loras`: files by the names that requests may say. `reload`: the same
        pipeline once more, after `release`."""
        self.name, self.steps, self.guidance = name, steps, guidance
        self.unknown_words, self.phrases = unknown_words, phrases
        self.loras, self._reload = dict(loras or {}), reload
        self.num_bytes = num_bytes_of(pipeline)
        self._take(pipeline)
        self.canvas = canvas_of(pipeline, square_only=square_only)
        # A fast tokenizer holds its truncation as state: the event loop must not share the pipeline's.
        self._tokenizer = deepcopy(pipeline.tokenizer)
        self.notices = lru_cache(NOTED_PROMPTS)(self._notices)

    def _take(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline: DiffusionPipeline | None = pipeline
        self._image_pipeline: DiffusionPipeline | None = None
        self._wardrobe = Wardrobe(pipeline, self.loras)

    @property
    def pipeline(self) -> DiffusionPipeline:
        assert self._pipeline is not None, "released; see shelf.py"
        return self._pipeline

    @property
    def is_loaded(self) -> bool:
        return self._pipeline is not None

    def release(self) -> None:
        """Let go of the weights until `restore`."""
        assert self._reload is not None
        self._pipeline = self._image_pipeline = None
        del self._wardrobe

    def restore(self) -> None:
        """Load the weights again."""
        assert self._reload is not None
        self._take(self._reload())

    @property
    def max_tokens(self) -> int:
        """Of a prompt, without the two that mark its start and end."""
        return self._tokenizer.model_max_length - 2

    def _notices(self, prompt: str) -> list[Notice]:
        """What of `prompt` the model will not see, or never saw; `notices` remembers it for other seeds."""
        found = []
        tokens = self._tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False).input_ids
        if len(tokens) > self.max_tokens:
            lost = self._tokenizer.decode(tokens[self.max_tokens :]).replace("</w>", " ").strip()
            found.append(
                Notice(
                    "prompt cut",
                    f"The model reads {self.max_tokens} tokens and the prompt has {len(tokens)}: "
                    f"it does not see {lost!r}.",
                    [lost],
                )
            )
        unknown = self.unknown_words(prompt) if self.unknown_words else []
        if unknown:
            found.append(Notice("unknown words", f"The model never saw {', '.join(map(repr, unknown))}.", unknown))
        return found

    def fit(self, size: tuple[int, int] | None, limits: Limits) -> tuple[tuple[int, int], list[Notice]]:
        """`size` (height, width; None: the model's own) as the model draws it, and a notice where that differs."""
        if size is None:
            size = (self.canvas.default, self.canvas.default)
        height, width = self.canvas.snap(size, max_pixels=limits.pixels)
        if (height, width) == size:
            return size, []
        asked, given = f"{size[1]}x{size[0]}", f"{width}x{height}"
        message = f"{self.name} does not draw {asked}: the picture is {given}."
        return (height, width), [Notice("size snapped", message, [asked, given])]

    def warm(self) -> None:
        """Draw once each way, so that the first request waits for no lazy work."""
        size = (self.canvas.default, self.canvas.default)
        grey = np.full((*size, 3), 128, np.uint8)
        for start in (None, Start(grey, 0.5)):
            self.draw([Order(self.name, "a person", 0, 1, size, start)])

    def draw(self, orders: Sequence[Order]) -> list[np.ndarray]:
        """The pictures (h w 3, uint8) of orders that share a key."""
        return self.begin(orders)()

    def begin(self, orders: Sequence[Order]) -> Callable[[], list[np.ndarray]]:
        """Begin to draw orders that share a key; what it returns waits for their pictures."""
        first = orders[0]
        self._wardrobe.wear(first.lora)
        if first.start is None:
            drawing = begin_drawing(
                self.pipeline,
                [order.prompt for order in orders],
                seeds=[order.seed for order in orders],
                steps=first.steps,
                guidance=self.guidance,
                size=first.size,
            )
            return lambda: list(drawing())
        starts = [order.start for order in orders if order.start is not None]
        drawn = [masked(*pair) for pair in zip(self._redraw(orders, starts), starts, strict=True)]
        return lambda: drawn

    def overlaps(self, orders: Sequence[Order]) -> bool:
        """Whether more orders of the same key may begin while these are drawn."""
        return orders[0].start is None and num_parts(self.pipeline, len(orders)) > 1

    @property
    def _redrawing(self) -> DiffusionPipeline:
        if self._image_pipeline is None:
            self._image_pipeline = AutoPipelineForImage2Image.from_pipe(self.pipeline)
            self._image_pipeline.set_progress_bar_config(disable=True)
        return self._image_pipeline

    @torch.inference_mode()
    def _redraw(self, orders: Sequence[Order], starts: Sequence[Start]) -> np.ndarray:
        images = torch.from_numpy(np.stack([start.image for start in starts])).permute(0, 3, 1, 2) / 255.0  # b 3 h w
        steps = orders[0].steps
        self._redrawing.scheduler = shortened(self.pipeline.scheduler, starts[0].strength, steps=steps)
        pictures = self._redrawing(
            prompt=[order.prompt for order in orders],
            image=images,
            strength=1.0,  # of the shortened schedule
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(order.seed) for order in orders],
            output_type="pt",
        ).images
        return as_bytes(pictures)


def shortened(scheduler: SchedulerMixin, strength: float, *, steps: int) -> SchedulerMixin:
    """The same sampler on the lower `strength` of its noise schedule: all of its `steps` lie there.

    diffusers' own `strength` drops whole steps instead, so that with one step every strength below 1 is nothing, and
    with two a slider has two places.
    """
    total = scheduler.config.num_train_timesteps
    last = min(total, max(steps, round(strength * total)))
    if last == total:
        return deepcopy(scheduler)
    betas = scheduler.betas[:last].tolist()  # rescaled already, where they are
    return type(scheduler).from_config(
        scheduler.config, num_train_timesteps=last, trained_betas=betas, rescale_betas_zero_snr=False
    )


def masked(picture: np.ndarray, start: Start) -> np.ndarray:
    """`picture` where the mask is 1, the start's own pixels where it is 0."""
    if start.mask is None:
        return picture
    share = start.mask[..., None]
    return (picture * share + start.image * (1 - share)).round().astype(np.uint8)


def check_text(prompt: str, limits: Limits) -> str:
    """The prompt, or `RequestError` where it is empty or longer than the server reads."""
    if not prompt.strip():
        raise RequestError("the prompt is empty", where="prompt", fix="Say what to draw.")
    if len(prompt) > limits.prompt:
        raise RequestError(
            f"the prompt has {len(prompt)} characters", where="prompt", fix=f"Send at most {limits.prompt}."
        )
    return prompt


def _nearest(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
