"""A caption by a vision-language model: one that transformers loads, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from onestroke.data.curation.decoding import encode
from onestroke.data.curation.recipe import RecaptionStage
from onestroke.errors import ModelError

Captioner = Callable[[UInt8[np.ndarray, "h w 3"], str], str]
_TRIES = 4
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP status of a server that may answer later
_OFF = "or set recaption.enabled to false."


def load_captioner(stage: RecaptionStage, *, pause: Callable[[float], None] = time.sleep) -> Captioner:
    """`pause` waits between two tries at the endpoint, for so many seconds."""
    return _by_endpoint(stage, pause) if stage.endpoint else _by_model(stage)


def _shown(image: UInt8[np.ndarray, "h w 3"], stage: RecaptionStage) -> Image.Image:
    picture = Image.fromarray(image)
    picture.thumbnail((stage.max_side, stage.max_side), Image.Resampling.LANCZOS)
    return picture


def _by_endpoint(stage: RecaptionStage, pause: Callable[[float], None]) -> Captioner:
    url = stage.endpoint.rstrip("/") + "/chat/completions"
    key = os.environ.get(stage.key_variable)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def caption(image: UInt8[np.ndarray, "h w 3"], before: str) -> str:
        picture = base64.b64encode(encode(np.asarray(_shown(image, stage)), "JPEG")).decode()
        asked = stage.prompt + (f" Its present caption: {before}" if before else "")
        content = [{"type": "text", "text": asked},
                   {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}}]  # fmt: skip
        page = {"model": stage.model, "messages": [{"role": "user", "content": content}], "temperature": 0, "seed": 0,
                "max_tokens": stage.max_tokens}  # fmt: skip
        request = urllib.request.Request(url, json.dumps(page).encode(), headers)
        return _answer(request, stage, pause)

    return caption


def _answer(request: urllib.request.Request, stage: RecaptionStage, pause: Callable[[float], None]) -> str:
    """The text of the answer; tries again where the server is busy. Raises ModelError."""
    for attempt in range(_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=stage.timeout) as answer:
                return _text_in(answer.read(), stage)
        except urllib.error.HTTPError as error:
            reason, again = f"HTTP {error.code}", error.code in _BUSY
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason, again = str(getattr(error, "reason", error)), True
        if not again or attempt == _TRIES - 1:
            break
        pause(2.0**attempt)
    fix = f"Check recaption.endpoint, recaption.model and the key in {stage.key_variable}, {_OFF}"
    raise ModelError(f"the captioning server gives no caption ({reason})", where=str(stage.endpoint), fix=fix)


def _text_in(content: bytes, stage: RecaptionStage) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        fix = f"Give an OpenAI-compatible server, {_OFF}"
        raise ModelError("the answer is no chat completion", where=str(stage.endpoint), fix=fix) from error
    return " ".join(str(text or "").split())


def _by_model(stage: RecaptionStage) -> Captioner:
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(stage.model, use_fast=False)
        model = AutoModelForImageTextToText.from_pretrained(stage.model).eval().requires_grad_(False)
    except Exception as error:  # transformers, safetensors and the hub each raise their own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = f"Download a vision-language model into a folder and name the folder, {_OFF}"
        raise ModelError(
            f"the model cannot be loaded ({reason})", where=f"recaption.model {stage.model}", fix=fix
        ) from error

    def caption(image: UInt8[np.ndarray, "h w 3"], before: str) -> str:
        picture = _shown(image, stage)
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": stage.prompt}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        else:  # BLIP and the like: the caption is all they write
            inputs = processor(images=picture, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=stage.max_tokens, do_sample=False)
        start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return " ".join(processor.batch_decode(written[:, start:], skip_special_tokens=True)[0].split())

    return caption
