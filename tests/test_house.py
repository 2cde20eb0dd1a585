"""What a team's server has: rate limits, several models under a memory budget, LoRAs by name, a safety model."""

from __future__ import annotations

import gc
import re
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from onestroke.commands.serve import House, drawer_of, drawers_of, split_name
from onestroke.errors import ModelError, RecipeError, ResourceError
from onestroke.serve.allowance import MAX_CLIENTS, Allowance, TooFast
from onestroke.serve.desk import Desk
from onestroke.serve.drawer import Drawer
from onestroke.serve.loras import MAX_LOADED, find_loras
from onestroke.serve.order import Order, RequestError
from onestroke.serve.safety import load_safety
from onestroke.serve.shelf import Shelf
from tests.pipelines import tiny_sdxl
from tests.servers import Scribe, client_of, picture_in, tiny_drawer
from tests.test_live import answer, ask

# rate limits


def test_a_bucket_fills_with_time_and_each_client_has_its_own():
    now = [0.0]
    allowance = Allowance(60, clock=lambda: now[0])  # one a second, 30 at once
    for _ in range(30):
        allowance.take("a", 1)
    with pytest.raises(TooFast) as fast:
        allowance.take("a", 3)
    assert fast.value.retry_after == 3
    allowance.take("b", 30)
    now[0] = 3.0
    allowance.take("a", 3)
    with pytest.raises(TooFast):
        allowance.take("a", 1)


def test_a_request_larger_than_a_bucket_takes_all_of_it():
    now = [0.0]
    allowance = Allowance(2, clock=lambda: now[0])
    allowance.take("a", 10)
    with pytest.raises(TooFast) as fast:
        allowance.take("a", 1)
    assert fast.value.retry_after == 30


def test_clients_are_forgotten_before_they_fill_the_memory():
    allowance = Allowance(60, clock=lambda: 0.0)
    for number in range(MAX_CLIENTS + 100):
        allowance.take(str(number), 1)
    assert len(allowance._buckets) == MAX_CLIENTS


def test_too_many_pictures_are_answered_429_and_on_the_websocket_with_a_time():
    scribe = Scribe()
    with client_of(scribe, per_minute=4) as client:
        assert client.post("/v1/images/generations", json={"prompt": "a", "n": 2}).status_code == 200
        refused = client.post("/v1/images/generations", json={"prompt": "b"})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 15
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        with client.websocket_connect("/v1/live") as socket:
            ask(socket, "p1", 1)
            header, _ = answer(socket)
        assert (header["type"], header["id"]) == ("error", 1) and 1 <= header["retry_after"] <= 15
    assert scribe.prompts == [["a", "a"]]


# several models under a budget


def reloadable(name: str) -> Drawer:
    return Drawer(name, tiny_drawer().pipeline, reload=lambda: tiny_drawer().pipeline)


def test_the_model_not_used_for_longest_makes_room():
    drawers = [reloadable(name) for name in "abc"]
    size = drawers[0].num_bytes
    assert size == sum(p.numel() * 4 for p in set(parameters(drawers[0].pipeline))) + buffer_bytes(drawers[0].pipeline)
    shelf = Shelf(drawers, budget=int(2.5 * size))
    assert shelf.num_bytes <= 2.5 * size
    a, b, c = drawers
    for drawer in (a, b, a, c):
        shelf.bring(drawer)
    assert [drawer.is_loaded for drawer in drawers] == [True, False, True]
    order = Order("b", "a cat", 3, 1, (64, 64))
    shelf.bring(b)
    assert np.array_equal(b.draw([order])[0], tiny_drawer("b").draw([order])[0])  # back, and the same
    assert [drawer.is_loaded for drawer in drawers] == [False, True, True]


def parameters(pipeline):
    return [p for part in pipeline.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]


def buffer_bytes(pipeline) -> int:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(buffer.nbytes for module in modules for buffer in module.buffers())


def test_what_is_released_is_gone():
    drawer = reloadable("a")
    drawer.draw([Order("a", "a", 0, 1, (64, 64))])
    weights = weakref.ref(drawer.pipeline.unet)
    drawer.release()
    gc.collect()
    assert weights() is None


def test_a_model_larger_than_the_budget_is_refused_at_the_start():
    with pytest.raises(ResourceError, match="--memory-gb"):
        Desk([reloadable("a")], memory=1000)


def test_two_models_are_served_under_a_budget_for_one():
    first, second = reloadable("first"), reloadable("second")
    with client_of(first, second, memory=int(1.5 * first.num_bytes)) as client:
        for name in ("second", "first", "second"):
            body = {"prompt": "a cat", "model": name, "seed": 3}
            made = client.post("/v1/images/generations", json=body)
            assert made.status_code == 200 and made.json()["model"] == name
        assert [first.is_loaded, second.is_loaded] == [False, True]
        told = re.search(r"^onestroke_model_bytes (\S+)", client.get("/metrics").text, re.M)
        assert float(told[1]) == second.num_bytes


def test_models_are_named_and_no_two_alike():
    assert split_name("mine=/models/a=b") == ("mine", "/models/a=b") and split_name("/a/b=c") == ("/a/b=c", "/a/b=c")
    names = [drawer.name for drawer in drawers_of("embedded", None, House(also=("again=embedded",)))]
    assert names == ["embedded", "again"]
    with pytest.raises(RecipeError, match="NAME=MODEL"):
        drawers_of("embedded", None, House(also=("embedded",)))


# LoRAs


def write_lora(folder, name: str, seed: int) -> None:
    """A LoRA of the tiny UNet that changes every picture much."""
    unet = tiny_sdxl("v_prediction", zero_snr=True).unet
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"]))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(unet)
    state = {key: torch.randn(value.shape, generator=generator) * 0.4 for key, value in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=state, weight_name=f"{name}.safetensors")


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder, "ink", 1)
    write_lora(folder, "wash.v2", 2)
    (folder / "broken.safetensors").write_bytes(b"rubbish")
    (folder / "pickle.bin").write_bytes(b"rubbish")
    return folder


def with_loras(folder) -> Drawer:
    return Drawer("tiny", tiny_drawer().pipeline, loras=find_loras(folder))


def test_a_lora_is_drawn_with_by_its_name_and_without_it_nothing_changed(lora_folder):
    plain = tiny_drawer().draw([Order("tiny", "a cat", 3, 1, (64, 64))])[0]
    with client_of(with_loras(lora_folder)) as client:
        assert client.get("/v1/models").json()["data"][0]["loras"] == ["broken", "ink", "wash.v2"]
        body = {"prompt": "a cat", "seed": 3, "size": "64x64"}

        def drawn(**fields) -> np.ndarray:
            made = client.post("/v1/images/generations", json=body | fields)
            assert made.status_code == 200, made.text
            return picture_in(made.json()).astype(int)

        before, ink, wash = drawn(), drawn(lora="ink"), drawn(lora="wash.v2")
        half, after, again = drawn(lora="ink", lora_scale=0.5), drawn(), drawn(lora="ink")
    assert np.array_equal(before, plain) and np.array_equal(after, plain) and np.array_equal(again, ink)
    pictures = [plain, ink, wash, half]
    assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(pictures) for b in pictures[:i])


@pytest.mark.parametrize("name", ["", "none", "../ink", "ink.safetensors", "pickle", "/etc/passwd", "ink\0"])
def test_a_lora_is_a_name_of_the_list_and_never_a_path(name, lora_folder):
    with client_of(with_loras(lora_folder)) as client:
        refused = client.post("/v1/images/generations", json={"prompt": "a", "lora": name})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora"


def test_a_file_that_is_no_lora_spoils_its_own_request_alone(lora_folder):
    drawer = with_loras(lora_folder)
    with client_of(drawer) as client:
        before = client.post("/v1/images/generations", json={"prompt": "a", "seed": 1}).json()
        refused = client.post("/v1/images/generations", json={"prompt": "a", "lora": "broken"})
        after = client.post("/v1/images/generations", json={"prompt": "a", "seed": 1}).json()
    assert refused.status_code == 400 and "is no LoRA of this model" in refused.json()["error"]["message"]
    assert np.array_equal(picture_in(before), picture_in(after))


def test_only_some_loras_stay_loaded(tmp_path):
    for number in range(MAX_LOADED + 2):
        write_lora(tmp_path, f"l{number}", number)
    drawer = with_loras(tmp_path)
    orders = [Order("tiny", "a", 0, 1, (64, 64), lora=(f"l{n}", 1.0)) for n in range(MAX_LOADED + 2)]
    pictures = [drawer.draw([order])[0] for order in orders]
    assert len(drawer.pipeline.get_list_adapters()["unet"]) == MAX_LOADED
    assert np.array_equal(drawer.draw([orders[0]])[0], pictures[0])  # loaded again


def test_the_embedded_student_wears_a_lora_in_its_own_dtype(tmp_path):
    drawer = drawer_of("embedded")
    unet = drawer.pipeline.unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = {key: torch.randn(value.shape) * 0.3 for key, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="mine.safetensors")
    dressed = drawer_of("embedded", loras=find_loras(tmp_path))
    size = (dressed.canvas.default,) * 2
    bare = dressed.draw([Order("embedded", "a person", 1, 1, size)])[0]
    worn = dressed.draw([Order("embedded", "a person", 1, 1, size, lora=("mine", 1.0))])[0]
    assert not np.array_equal(bare, worn)
    assert np.array_equal(bare, dressed.draw([Order("embedded", "a person", 1, 1, size)])[0])


def test_a_folder_without_loras_is_said(tmp_path):
    with pytest.raises(RecipeError, match="there is no LoRA here"):
        find_loras(tmp_path)
    with pytest.raises(RecipeError, match="this is no folder"):
        find_loras(tmp_path / "none")


# safety


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A ViT without layers that gives every picture the label "nsfw" at a probability of 1 / (1 + exp(-5))."""
    folder = tmp_path_factory.mktemp("safety")
    config = ViTConfig(
        image_size=32, patch_size=32, hidden_size=4, num_hidden_layers=0, num_attention_heads=1, intermediate_size=4,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 5.0]))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_what_the_safety_model_blocks_is_withheld_on_both_ways(classifier):
    safety = load_safety(str(classifier), blocked=["NSFW"], threshold=0.9, device=torch.device("cpu"))
    scribe = Scribe()
    with client_of(scribe, safety=safety) as client:
        refused = client.post("/v1/images/generations", json={"prompt": "a"})
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "content_policy_violation"
        assert "withholds this picture" in refused.json()["error"]["message"]
        with client.websocket_connect("/v1/live") as socket:
            ask(socket, "p1", 1)
            header, _ = answer(socket)
        assert header["type"] == "error" and "withholds" in header["message"]
    lenient = load_safety(str(classifier), blocked=["nsfw"], threshold=0.999, device=torch.device("cpu"))
    with client_of(Scribe(), safety=lenient) as client:  # 1 / (1 + exp(-5)) = 0.993
        assert client.post("/v1/images/generations", json={"prompt": "a"}).status_code == 200


def test_a_safety_model_that_is_none_or_lacks_the_label_is_refused_at_the_start(classifier, tmp_path):
    with pytest.raises(ModelError, match="no image classifier"):
        load_safety(str(tmp_path), blocked=["nsfw"], threshold=0.5, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match="Choose of normal, nsfw"):
        load_safety(str(classifier), blocked=["gore"], threshold=0.5, device=torch.device("cpu"))


def test_one_withheld_picture_does_not_withhold_its_batch_mates():
    class Picky:
        def check(self, pictures):
            return [RequestError("withheld") if picture[0, 0, 0] == 1 else None for picture in pictures]

    desk = Desk([Scribe()], safety=Picky())
    kinds = [type(one) for one in desk._begin([Order("scribe", "a", seed, 1, (64, 64)) for seed in (0, 1, 2)])()]
    assert kinds == [np.ndarray, RequestError, np.ndarray]
