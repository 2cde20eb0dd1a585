"""LoRAs that a request may name: the files of one folder, read at the start. A name is looked up, never opened."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline

from onestroke.errors import RecipeError
from onestroke.serve.order import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
MAX_LOADED = 8  # adapters that stay in one model


def find_loras(folder: Path) -> dict[str, Path]:
    """The safetensors files of `folder` by their names without the ending. Raises `RecipeError`."""
    found = {path.stem: path.resolve() for path in sorted(folder.glob("*.safetensors")) if NAME.fullmatch(path.stem)}
    if not found:
        raise RecipeError(
            "there is no LoRA here" if folder.is_dir() else "this is no folder",
            where=str(folder),
            fix="Give a folder of .safetensors files whose names are letters, digits, dots, dashes and underscores.",
        )
    return found


class Wardrobe:
    """The LoRAs of one pipeline, loaded when they are first asked for."""

    def __init__(self, pipeline: DiffusionPipeline, files: Mapping[str, Path]) -> None:
        self._pipeline, self._files = pipeline, files
        self._loaded: OrderedDict[str, str] = OrderedDict()  # name -> adapter, the one worn last at the end
        self._count = 0
        self._worn: tuple[str, float] | None = None

    def wear(self, lora: tuple[str, float] | None) -> None:
        """Draw with the LoRA of that name at that scale from now on, or with none. Raises `RequestError`."""
        if lora == self._worn:
            return
        if lora is None:
            self._pipeline.disable_lora()
        else:
            name, scale = lora
            adapter = self._adapter(name)
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([adapter], [scale])
            self._loaded.move_to_end(name)
        self._worn = lora

    def _adapter(self, name: str) -> str:
        if name not in self._loaded:
            self._worn = None
            while len(self._loaded) >= MAX_LOADED:
                self._pipeline.delete_adapters(self._loaded.popitem(last=False)[1])
            self._count += 1
            adapter = f"lora{self._count}"
            try:
                self._pipeline.load_lora_weights(str(self._files[name]), adapter_name=adapter, use_safetensors=True)
                fits = any(adapter in names for names in self._pipeline.get_list_adapters().values())
            except Exception as error:  # diffusers and peft raise many kinds for a file that is none of theirs
                self._forget(adapter)
                raise _unfit(name) from error
            if not fits:
                self._pipeline.disable_lora()
                raise _unfit(name)
            self._loaded[name] = adapter
        return self._loaded[name]

    def _forget(self, adapter: str) -> None:
        """Take away what a failed loading left, so that the model draws as before."""
        if any(adapter in names for names in self._pipeline.get_list_adapters().values()):
            self._pipeline.delete_adapters(adapter)
        if self._loaded:
            self._pipeline.disable_lora()


def _unfit(name: str) -> RequestError:
    return RequestError(f"{name!r} is no LoRA of this model", where="lora", fix="Choose one of another name.")
