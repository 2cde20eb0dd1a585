"""Strangers at the server: Schemathesis on its OpenAPI, and WebSockets that send rubbish, stall or break off."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct

import pytest
import schemathesis
import websockets
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from onestroke.serve.app import build_app
from onestroke.serve.batcher import Pace
from onestroke.serve.order import Limits
from tests.servers import Scribe, running

EXAMPLES = int(os.environ.get("ONESTROKE_SCHEMATHESIS_EXAMPLES", "12"))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
PLAIN = ["GET /health", "GET /ready", "GET /metrics", "GET /v1/models"]  # nothing is asked that could be wrong
ASKING = ["GET /v1/phrases", "POST /v1/images/generations", "POST /v1/images/edits"]
CASES = [(name, GenerationMode.POSITIVE) for name in (*PLAIN, *ASKING)] + [
    (name, GenerationMode.NEGATIVE) for name in ASKING
]


@pytest.fixture(scope="module")
def address():
    limits = Limits(pixels=128 * 128, count=2)
    with running(build_app([Scribe()], pace=Pace(wait=0.0), limits=limits)) as url:
        yield url


@pytest.fixture(scope="module")
def operations(address):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_every_answer_is_one_that_the_openapi_names(name, mode, operations):
    assert set(operations) == {*PLAIN, *ASKING}
    operation = operations[name]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case):
        case.call_and_validate(checks=CHECKS, timeout=30)

    ask()


def draw_frame(number: int, **fields) -> str:
    return json.dumps({"type": "draw", "panel": "p", "id": number, "prompt": "a"} | fields)


async def is_well(live: str) -> bool:
    """Whether somebody else is still served."""
    async with websockets.connect(live) as good:
        await good.send(draw_frame(1))
        return isinstance(await asyncio.wait_for(good.recv(), 15), bytes)


def on_server(script) -> None:
    """Run `script(live address)` beside a server with a short limit of a frame; it may not take half a minute."""
    with running(build_app([Scribe()], pace=Pace(wait=0.0))) as url:
        asyncio.run(asyncio.wait_for(script(url.replace("http", "ws") + "/v1/live"), 30))


def test_rubbish_in_binary_and_text_ends_in_errors_and_a_close_and_harms_no_other():
    async def script(live: str) -> None:
        binary = [b"", b"\x00" * 1000, os.urandom(4096), struct.pack(">I", 2**31) + b"{}"]
        nested = '{"type":"draw"' + ',"a":1' * 2000 + "}"
        rubbish = [*binary, "\x00", "{" * 3000, "9" * 5000, nested, '"\\ud800"', "\U0001f600" * 2000]
        async with websockets.connect(live) as bad:
            answers = []
            with pytest.raises(websockets.ConnectionClosed) as closed:
                for frame in rubbish * 3:
                    await bad.send(frame)
                    answers.append(json.loads(await asyncio.wait_for(bad.recv(), 10)))
            assert {one["type"] for one in answers} == {"error"} and closed.value.rcvd.code == 1008
        assert await is_well(live)

    on_server(script)


def test_a_bomb_of_a_picture_and_a_frame_over_the_limit_are_refused():
    # A PNG that says it has 60,000 x 60,000 pixels; it is never unpacked.
    head = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + b"\x00" * 4
    bomb = base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\x00" * 4).decode()

    async def script(live: str) -> None:
        async with websockets.connect(live, max_size=None) as bad:
            await bad.send(draw_frame(1, image=bomb))
            assert json.loads(await asyncio.wait_for(bad.recv(), 10))["type"] == "error"
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await bad.send("x" * 2**21)
                await asyncio.wait_for(bad.recv(), 10)
            assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
        assert await is_well(live)

    on_server(script)


def raw_upgrade(live: str) -> socket.socket:
    """A WebSocket whose frames are written by hand."""
    host, port = live.removeprefix("ws://").split("/")[0].split(":")
    raw = socket.create_connection((host, int(port)), timeout=10)
    key = base64.b64encode(os.urandom(16)).decode()
    raw.sendall(
        f"GET /v1/live HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert raw.recv(4096).startswith(b"HTTP/1.1 101")
    return raw


@pytest.mark.parametrize(
    "sent",
    [
        b"\x81",  # half of a header
        b"\x81\xfe\xff\xff" + b"abcd" + b"x" * 100,  # says 65,535 bytes, sends 100, stalls
        b"\x81\x05hello",  # not masked, which clients must
        b"\x83\x80abcd",  # an opcode that there is not
        b"\x81\x82abcd\x9e\x9d",  # text that is no UTF-8
        b"\xff" * 200,
    ],
)
def test_half_frames_and_wrong_frames_stop_no_other(sent):
    async def script(live: str) -> None:
        bad = await asyncio.to_thread(raw_upgrade, live)
        await asyncio.to_thread(bad.sendall, sent)
        assert await is_well(live)
        bad.shutdown(socket.SHUT_WR)  # half-closed: it still listens
        bad.settimeout(10)
        while await asyncio.to_thread(bad.recv, 4096):  # the server ends its half too, and soon
            pass
        bad.close()

    on_server(script)


def test_a_client_that_sends_slowly_or_reads_nothing_holds_nobody_up():
    async def script(live: str) -> None:
        slow = await asyncio.to_thread(raw_upgrade, live)
        deaf = await asyncio.to_thread(raw_upgrade, live)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for number in range(60):  # asks and never reads
            payload = draw_frame(number, panel=f"p{number}", size="128x128").encode()
            masked = bytes(byte ^ mask for byte, mask in zip(payload, b"abcd" * len(payload), strict=False))
            header = b"\x81" + bytes([0xFE]) + struct.pack(">H", len(payload)) + b"abcd"
            await asyncio.to_thread(deaf.sendall, header + masked)
        for byte in b"\x81\xfe\x40\x00abcd":
            await asyncio.to_thread(slow.sendall, bytes([byte]))
            assert await is_well(live)
        for one in (slow, deaf):
            one.close()

    on_server(script)
