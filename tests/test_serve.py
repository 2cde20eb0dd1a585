"""The server: what is drawn together, what is refused, and that OpenAI's client works unchanged."""

from __future__ import annotations

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import openai
import pytest
import torch
from PIL import ExifTags, Image

from onestroke.commands.serve import drawer_of
from onestroke.sample import draw
from onestroke.serve.app import build_app
from onestroke.serve.batcher import Pace
from onestroke.serve.drawer import Canvas, Drawer, shortened
from onestroke.serve.order import MAX_SEED, Limits, Order, RequestError
from onestroke.serve.pictures import picture_bytes, read_base64, read_picture, start_of
from tests.pipelines import tiny_sd, tiny_sdxl
from tests.servers import Scribe, client_of, file_of, picture_in, pixels_of, psnr, running, tiny_drawer

# drawer


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((64, 64), (64, 64)),
        ((65, 71), (64, 72)),
        ((8, 9000), (32, 128)),
        ((128, 128), (96, 96)),
        ((200, 100), (104, 88)),
    ],
)
def test_sizes_snap_to_what_the_model_draws(asked, given):
    assert Canvas(64, 8).snap(asked, max_pixels=96 * 96) == given  # half to twice 64, multiples of 8, 9,216 pixels


def test_a_model_of_one_size_draws_that_size():
    assert Canvas(128, 16, square_only=True).snap((64, 512), max_pixels=10**6) == (128, 128)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_same_seed_is_the_same_picture_in_any_company(steps):
    drawer = tiny_drawer()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for start in (None, start_of(image, (64, 64), strength=0.5)):
        orders = [Order("tiny", f"picture {seed}", seed, steps, (64, 64), start) for seed in range(5)]
        together = drawer.draw(orders)
        alone = [drawer.draw([one])[0] for one in orders]
        assert min(psnr(one, two) for one, two in zip(together, alone, strict=True)) >= 35
        assert psnr(alone[0], alone[1]) < 35
        assert np.array_equal(alone[2], drawer.draw([orders[2]])[0])


def test_a_picture_of_the_server_is_the_pipelines_own():
    drawer = tiny_drawer()
    (mine,) = drawer.draw([Order("tiny", "a cat", 7, 2, (64, 64))])
    assert np.array_equal(mine, draw(drawer.pipeline, ["a cat"], seeds=[7], steps=2, guidance=0.0)[0])


@pytest.mark.parametrize("family", [tiny_sd, tiny_sdxl])
def test_strength_moves_from_the_start_picture_to_the_prompts_own(family):
    drawer = Drawer("tiny", family("v_prediction", zero_snr=True))
    drawer.pipeline.set_progress_bar_config(disable=True)
    ramp = np.repeat(np.linspace(0, 255, 64)[None, :, None], 64, axis=0).repeat(3, axis=2).astype(np.uint8)
    changes = []
    for strength in (0.1, 0.3, 0.5, 0.8):
        start = start_of(Image.fromarray(ramp), (64, 64), strength=strength)
        (picture,) = drawer.draw([Order("tiny", "a", 1, 1, (64, 64), start)])
        changes.append(picture.astype(float))
    distances = [np.abs(one - two).mean() for one, two in pairwise(changes)]
    assert min(distances) > 0.1  # one step, and still every strength is another picture


def test_a_shortened_schedule_is_the_lower_part_of_the_long_one():
    scheduler = tiny_drawer().pipeline.scheduler
    short = shortened(scheduler, 0.6, steps=2)
    torch.testing.assert_close(short.alphas_cumprod, scheduler.alphas_cumprod[:600])
    short.set_timesteps(2)
    assert short.timesteps.tolist() == [599, 299]
    whole = shortened(scheduler, 1.0, steps=1)
    torch.testing.assert_close(whole.alphas_cumprod, scheduler.alphas_cumprod)


def test_a_masked_redraw_leaves_the_other_pixels_alone():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    start = start_of(image, (64, 64), strength=0.9, mask=Image.fromarray(mask))
    (picture,) = tiny_drawer().draw([Order("tiny", "a", 1, 1, (64, 64), start)])
    assert np.array_equal(picture[:, :28], np.asarray(image)[:, :28])
    assert np.abs(picture[:, 36:].astype(int) - np.asarray(image)[:, 36:]).mean() > 5


def test_a_transparent_mask_is_redrawn_where_it_is_transparent_as_openai_has_it():
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    region = start_of(image, (64, 64), strength=0.5, mask=mask).mask
    assert region[:, :28].min() == 1.0 and region[:, 36:].max() == 0.0


# uploads


@pytest.mark.parametrize(
    "data", [b"", b"rubbish", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"<svg/>", b"GIF89a" + b"\0" * 20]
)
def test_what_is_no_picture_is_refused_in_one_line(data):
    with pytest.raises(RequestError, match="image: this is no picture that can be read. Send a whole PNG"):
        read_picture(data, Limits(), where="image")


def test_a_cut_picture_and_one_of_too_many_pixels_are_refused():
    whole = file_of(np.zeros((200, 200, 3), np.uint8) + np.arange(200, dtype=np.uint8)[:, None, None])
    with pytest.raises(RequestError, match="no picture"):
        read_picture(whole[: len(whole) // 2], Limits(), where="image")
    with pytest.raises(RequestError, match="200 x 200 pixels"):
        read_picture(whole, Limits(upload_pixels=39_999), where="image")


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "data:image/png,x", "é"]
)
def test_no_address_or_path_in_a_request_is_opened(text):
    with pytest.raises(RequestError):
        read_base64(text, Limits(), where="image")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_written_picture_says_what_it_was_drawn_from(kind):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    data = picture_bytes(picture, kind, {"prompt": "naïve", "software": "onestroke"})
    image = Image.open(io.BytesIO(data))
    assert image.format == kind.upper() and image.size == (7, 5) and image.mode == "RGB"
    assert kind != "png" or np.array_equal(np.asarray(image), picture)
    written = image.text if kind == "png" else json.loads(image.getexif()[ExifTags.Base.ImageDescription])
    assert written["prompt"] == "naïve"


# API


def test_health_answers_at_once_and_ready_only_when_warm():
    class Slow(Scribe):
        def warm(self):
            assert self.free.wait(10)

    slow = Slow(held=True)
    with client_of(slow) as client:
        assert client.get("/health").json()["status"] == "ok"
        assert client.get("/ready").status_code == 503
        slow.free.set()
        for _ in range(200):
            if client.get("/ready").status_code == 200:
                break
        assert client.get("/ready").json() == {"ready": True}


def test_a_request_gets_the_pictures_of_its_seeds():
    with client_of(Scribe()) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "n": 3, "seed": MAX_SEED, "size": "64x32"})
    assert answer.status_code == 200
    assert [one["seed"] for one in answer.json()["data"]] == [MAX_SEED, 0, 1]
    assert [picture_in(answer.json(), i)[0, 0, 0] for i in range(3)] == [255, 0, 1]
    assert picture_in(answer.json()).shape == (32, 64, 3)
    assert answer.json()["size"] == "64x32" and answer.json()["notices"] == []


def test_what_is_changed_is_said():
    with client_of(tiny_drawer()) as client:
        body = {"prompt": "b" * 80 + "dropped", "size": "60x64", "negative_prompt": "ugly", "user": "me", "seed": 1}
        answer = client.post("/v1/images/generations", json=body).json()
    notices = {notice["kind"]: notice for notice in answer["notices"]}
    assert set(notices) == {"size snapped", "prompt cut", "ignored"}
    assert notices["size snapped"]["detail"] == ["60x64", "64x64"]
    assert notices["prompt cut"]["message"].startswith("The model reads 75 tokens and the prompt has 87")
    assert notices["prompt cut"]["detail"] == ["bbbbbdropped"]
    assert "without guidance" in notices["ignored"]["message"]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "a" * 2001}, 400, "prompt"),
        ({"prompt": 7}, 400, "prompt"),
        ({"n": 0}, 400, "n"),
        ({"n": 11}, 400, "n"),
        ({"size": "big"}, 400, "size"),
        ({"size": "0x64"}, 400, "size"),
        ({"seed": -1}, 400, "seed"),
        ({"num_inference_steps": 51}, 400, "num_inference_steps"),
        ({"model": "../../etc"}, 404, "model"),
        ({"stream": True}, 400, "stream"),
    ],
)
def test_a_wrong_request_is_named_and_draws_nothing(change, status, param):
    scribe = Scribe()
    with client_of(scribe) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a"} | change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert scribe.batches == []


def test_a_full_queue_answers_503_with_retry_after():
    scribe = Scribe(held=True)
    with client_of(scribe, pace=Pace(wait=0.0, max_queue=1)) as client:
        threads = []
        for i in range(2):  # one is drawn, one waits
            post = lambda i=i: client.post("/v1/images/generations", json={"prompt": f"{i}"})  # noqa: E731
            threads.append(threading.Thread(target=post))
            threads[-1].start()
            if i == 0:
                assert scribe.began.wait(10)
        while client.app.state.desk.batcher.num_waiting < 1:
            pass
        answer = client.post("/v1/images/generations", json={"prompt": "too much"})
        scribe.free.set()
        for thread in threads:
            thread.join(10)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert scribe.prompts == [["0"], ["1"]]


def test_a_broken_model_says_nothing_of_itself():
    with client_of(Scribe()) as client:
        client._transport.raise_server_exceptions = False
        answer = client.post("/v1/images/generations", json={"prompt": "fail"})
    assert answer.status_code == 500 and "secret" not in answer.text


def test_metrics_count_what_was_drawn_and_openapi_names_the_routes():
    with client_of(Scribe()) as client:
        client.post("/v1/images/generations", json={"prompt": "a", "n": 2})
        text = client.get("/metrics").text
        paths = client.get("/openapi.json").json()["paths"]
    assert 'onestroke_pictures_total{mode="draw",model="scribe"} 2.0' in text
    assert "onestroke_batch_size_count 1.0" in text
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/ready"} <= set(paths)


def test_the_openai_client_works_unchanged():
    drawer = tiny_drawer()
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with running(build_app([drawer])) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        made = client.images.generate(
            prompt="a cat", n=2, size="64x64", extra_body={"seed": 7, "num_inference_steps": 2}
        )
        edited = client.images.edit(
            image=("start.png", file_of(picture), "image/png"), prompt="a cat", extra_body={"seed": 7, "strength": 0.3}
        )
        with pytest.raises(openai.BadRequestError, match="num_inference_steps: 999 is out of range"):
            client.images.generate(prompt="a", extra_body={"num_inference_steps": 999})
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            client.images.generate(prompt="a", model="dall-e-2")
    expected = draw(drawer.pipeline, ["a cat"] * 2, seeds=[7, 8], steps=2, guidance=0.0)
    for one, two in zip(made.data, expected, strict=True):
        assert psnr(pixels_of(base64.b64decode(one.b64_json)), two) >= 35
    start = start_of(Image.fromarray(picture), (64, 64), strength=0.3)
    (redrawn,) = drawer.draw([Order("tiny", "a cat", 7, 1, (64, 64), start)])
    assert psnr(pixels_of(base64.b64decode(edited.data[0].b64_json)), redrawn) >= 35


def test_the_embedded_student_says_what_it_does_not_know():
    with client_of(drawer_of("embedded")) as client:
        body = {"prompt": "a laughing person with pink hair riding a bicycle", "size": "512x64", "seed": 5}
        answer = client.post("/v1/images/generations", json=body).json()
    assert answer["size"] == "128x128"
    assert {notice["kind"]: notice["detail"] for notice in answer["notices"]} == {
        "size snapped": ["512x64", "128x128"],
        "unknown words": ["riding", "bicycle"],
    }


def test_200_requests_to_the_embedded_student_are_the_same_pictures_in_company_and_alone():
    moods, colors = ("laughing", "sad", "angry", "calm"), ("pink", "black", "green", "red", "blue")
    asked = [
        {"prompt": f"a {mood} person with {color} hair on a yellow background", "seed": 1000 * i, "n": 10}
        for i, (mood, color) in enumerate(product(moods, colors))
    ]

    def drawn(client, **fields) -> tuple[list[np.ndarray], set[int]]:
        with ThreadPoolExecutor(len(asked)) as clients:
            posts = list(clients.map(lambda body: client.post("/v1/images/generations", json=body | fields), asked))
        answers = [post.json() for post in posts]
        sizes = {answer["timings"]["batch_size"] for answer in answers}
        return [picture_in(answer, i) for answer in answers for i in range(10)], sizes

    with client_of(drawer_of("embedded"), pace=Pace(max_queue=200)) as client:
        company, sizes = drawn(client)
        alone, single = drawn(client, strict=True)
        again = client.post("/v1/images/generations", json=asked[7] | {"strict": True}).json()
    least = min(psnr(one, two) for one, two in zip(company, alone, strict=True))
    print(f"200 pictures in batches of up to {max(sizes)} against alone: at least {least:.1f} dB")
    assert len(company) == 200 and max(sizes) == 16 and single == {1} and least >= 35
    assert all(np.array_equal(picture_in(again, i), alone[70 + i]) for i in range(10))
    assert max(psnr(one, two) for one, two in pairwise(alone)) < 35


def test_edits_refuse_none_two_and_broken_pictures():
    good = file_of(np.zeros((64, 64, 3), np.uint8))
    small = file_of(np.zeros((32, 32), np.uint8))
    with client_of(Scribe()) as client:
        for files, words in (
            ([], "0 pictures"),
            ([("image[]", good), ("image[]", good)], "2 pictures"),
            ([("image", b"rubbish")], "no picture"),
            ([("image", good), ("mask", small)], "the mask has 32 x 32"),
        ):
            answer = client.post("/v1/images/edits", data={"prompt": "a"}, files=files or [("x", good)])
            assert answer.status_code == 400 and words in answer.json()["error"]["message"]
        answer = client.post("/v1/images/edits", data={"prompt": "a", "strength": "7"}, files=[("image", good)])
        assert answer.json()["error"]["param"] == "strength"
