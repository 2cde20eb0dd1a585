"""The WebSocket: the newest request of a panel wins, every request gets an answer, and rubbish does no harm."""

from __future__ import annotations

import asyncio
import base64
import json
import struct

import numpy as np
import pytest
import websockets
from starlette.websockets import WebSocketDisconnect

from onestroke.serve.app import build_app
from onestroke.serve.batcher import Pace
from onestroke.serve.order import Limits
from tests.servers import Scribe, client_of, client_to, file_of, pixels_of, running, tiny_drawer

EAGER = Pace(wait=0.0)


def ask(socket, panel: str, number: int, prompt: str = "a", **fields) -> None:
    socket.send_text(
        json.dumps({"type": "draw", "panel": panel, "id": number, "prompt": prompt, "seed": number} | fields)
    )


def answer(socket) -> tuple[dict, np.ndarray | None]:
    """The next answer, and its picture if it is one."""
    message = socket.receive()
    if message["type"] == "websocket.close":
        raise WebSocketDisconnect(message["code"], message.get("reason"))
    if message.get("text") is not None:
        return json.loads(message["text"]), None
    frame = message["bytes"]
    (length,) = struct.unpack(">I", frame[:4])
    return json.loads(frame[4 : 4 + length]), pixels_of(frame[4 + length :])


def test_a_picture_carries_what_it_was_drawn_from():
    with client_of(Scribe(), pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 7, size="63x64", steps=2)
        header, picture = answer(socket)
    expected = {"type": "picture", "panel": "p1", "id": 7, "current": True, "seed": 7, "steps": 2, "size": "64x64"}
    assert header.items() >= expected.items()
    assert [notice["kind"] for notice in header["notices"]] == ["size snapped"]
    assert set(header["timings"]) == {"queue", "draw", "encode", "batch_size"}
    assert picture.shape == (64, 64, 3) and picture[0, 0].tolist() == [7, 2, 0]


def test_the_newest_request_of_a_panel_wins_and_the_others_cost_nothing():
    scribe = Scribe(held=True)
    with client_of(scribe, pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 1, "begun")
        assert scribe.began.wait(10)
        for number in (2, 3, 4):
            ask(socket, "p1", number, f"typed {number}")
        ask(socket, "p2", 5, "another panel")
        assert [answer(socket)[0] for _ in range(2)] == [
            {"type": "superseded", "panel": "p1", "id": number} for number in (2, 3)
        ]
        scribe.free.set()
        headers = [answer(socket)[0] for _ in range(3)]
    assert scribe.prompts == [["begun"], ["typed 4", "another panel"]]
    told = {header["id"]: header["current"] for header in headers}
    assert told == {1: False, 4: True, 5: True}  # the begun one is shown, and says that it is not the newest
    assert [header["id"] for header in headers if header["panel"] == "p1"] == [1, 4]


def test_a_picture_never_follows_a_newer_one_of_its_panel():
    scribe = Scribe()
    app = build_app([scribe], pace=EAGER)
    desk, write, delays = app.state.desk, app.state.desk.encode, {1: 0.4, 2: 0.0}

    async def slow_for_the_first(order, drawn, kind):
        await asyncio.sleep(delays[order.seed])
        return await write(order, drawn, kind)

    desk.encode = slow_for_the_first
    with client_to(app) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 1, "first")
        assert scribe.began.wait(10)
        ask(socket, "p1", 2, "second")
        answers = [answer(socket)[0] for _ in range(2)]
    assert [(one["type"], one["id"]) for one in answers] == [("picture", 2), ("superseded", 1)]


def test_who_disconnects_takes_waiting_requests_along():
    scribe = Scribe(held=True)
    with client_of(scribe, pace=EAGER) as client:
        with client.websocket_connect("/v1/live") as socket:
            ask(socket, "p1", 1, "begun")
            assert scribe.began.wait(10)
            ask(socket, "p2", 2, "left behind")
            socket.send_text('{"type": "ping"}')
            assert answer(socket)[0] == {"type": "pong"}
        for _ in range(400):
            if client.app.state.desk.batcher.num_waiting == 0:
                break
            client.get("/health")
        scribe.free.set()
        client.post("/v1/images/generations", json={"prompt": "after"})
        dropped = client.get("/metrics").text
    assert scribe.prompts == [["begun"], ["after"]]
    assert "onestroke_dropped_total 1.0" in dropped
    assert "onestroke_live_connections 0.0" in dropped


def test_cancel_drops_what_waits():
    scribe = Scribe(held=True)
    with client_of(scribe, pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 1, "begun")
        assert scribe.began.wait(10)
        ask(socket, "p2", 2, "cancelled")
        socket.send_text('{"type": "cancel", "panel": "p2"}')
        assert answer(socket)[0] == {"type": "superseded", "panel": "p2", "id": 2}
        scribe.free.set()
        assert answer(socket)[0]["id"] == 1
    assert scribe.prompts == [["begun"]]


@pytest.mark.parametrize(
    "frame",
    [
        "", "rubbish", "[]", "null", '{"type": "draw"}', '{"type": "open", "path": "/etc/passwd"}', "[" * 5000,
        '{"type": "draw", "panel": "p", "id": -1, "prompt": "a"}',
        '{"type": "draw", "panel": "p", "id": 1, "prompt": "a", "path": "x"}',
        '{"type": "draw", "panel": "p", "id": 1, "prompt": "a", "seed": 1e999}',
        '{"type": "draw", "panel": "' + "p" * 65 + '", "id": 1, "prompt": "a"}',
    ],
)  # fmt: skip
def test_a_frame_that_is_no_request_is_answered_and_the_connection_goes_on(frame):
    with client_of(Scribe(), pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        socket.send_text(frame)
        assert answer(socket)[0]["type"] == "error"
        ask(socket, "p1", 1)
        assert answer(socket)[0]["type"] == "picture"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": " "}, "prompt"),
        ({"model": "../x"}, "no model"),
        ({"steps": 0}, "out of range"),
        ({"image": "http://127.0.0.1/x.png"}, "base64"),
        ({"image": base64.b64encode(b"rubbish").decode()}, "no picture"),
        ({"image": base64.b64encode(file_of(np.zeros((8, 8, 3), np.uint8))).decode(), "strength": 2.0}, "strength"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_answered_with_its_id(fields, words):
    scribe = Scribe()
    with client_of(scribe, pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 9, **fields)
        header, _ = answer(socket)
    assert (header["type"], header["panel"], header["id"]) == ("error", "p1", 9)
    assert words in header["message"] and scribe.batches == []


def test_a_broken_model_and_a_full_queue_are_answers_too():
    scribe = Scribe()
    with client_of(scribe, pace=Pace(wait=0.0, max_queue=1)) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 1, "fail")
        assert answer(socket)[0] == {
            "type": "error",
            "panel": "p1",
            "id": 1,
            "message": "The picture could not be drawn.",
        }
        scribe.free.clear()
        scribe.began.clear()
        ask(socket, "p1", 2)
        assert scribe.began.wait(10)
        ask(socket, "p2", 3)
        ask(socket, "p3", 4)
        header, _ = answer(socket)
        scribe.free.set()
        assert (header["id"], header["retry_after"]) == (4, 1)


def test_who_sends_nothing_but_rubbish_is_left():
    with client_of(Scribe()) as client, client.websocket_connect("/v1/live") as socket:
        for _ in range(20):
            socket.send_bytes(b"\xff\x00\x80")
        for _ in range(20):
            assert answer(socket)[0]["type"] == "error"
        with pytest.raises(WebSocketDisconnect):
            answer(socket)


def test_one_connection_cannot_fill_the_server_with_panels():
    scribe = Scribe(held=True)
    limits = Limits(panels=2)
    with client_of(scribe, pace=EAGER, limits=limits) as client, client.websocket_connect("/v1/live") as socket:
        for number in range(3):
            ask(socket, f"p{number}", number)
        header, _ = answer(socket)
        scribe.free.set()
        assert header["id"] == 2 and "too many" in header["message"]


def test_a_sketch_is_redrawn_and_a_mask_keeps_the_rest():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 40:] = 255
    sent = {"image": base64.b64encode(file_of(picture)).decode(), "mask": base64.b64encode(file_of(mask)).decode()}
    with client_of(tiny_drawer(), pace=EAGER) as client, client.websocket_connect("/v1/live") as socket:
        ask(socket, "p1", 1, strength=0.5, **sent)
        header, redrawn = answer(socket)
    assert header["type"] == "picture"
    assert np.array_equal(redrawn[:, :36], picture[:, :36])
    assert not np.array_equal(redrawn[:, 44:], picture[:, 44:])


def test_huge_slow_and_half_closed_connections_stop_no_other():
    scribe = Scribe()

    async def script(address: str) -> None:
        live = address.replace("http", "ws") + "/v1/live"
        async with websockets.connect(live, max_size=None) as huge:
            with pytest.raises(websockets.ConnectionClosed):
                await huge.send("x" * 2**21)  # over the server's limit of a frame
                await asyncio.wait_for(huge.recv(), 10)
        half = await websockets.connect(live)
        half.transport.write_eof()
        slow = await websockets.connect(live)  # connects, asks and never reads
        await slow.send(json.dumps({"type": "draw", "panel": "p", "id": 1, "prompt": "a"}))
        async with websockets.connect(live) as good:
            await good.send(json.dumps({"type": "draw", "panel": "p", "id": 2, "prompt": "a"}))
            assert isinstance(await asyncio.wait_for(good.recv(), 10), bytes)
        for socket in (half, slow):
            socket.transport.abort()

    with running(build_app([scribe], pace=EAGER)) as address:
        asyncio.run(asyncio.wait_for(script(address), 30))
