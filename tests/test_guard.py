"""Who may ask: no web page drives a local server, no stranger an open one."""

from __future__ import annotations

import io
import socket

import pytest
import uvicorn
from rich.console import Console
from starlette.websockets import WebSocketDisconnect

from onestroke.cli import app as command_line
from onestroke.commands import serve
from onestroke.commands.serve import Address, listen
from onestroke.errors import RecipeError, ResourceError
from onestroke.serve.app import build_app
from onestroke.serve.guard import Rules, check_token, is_local, name_of, same_origin
from onestroke.serve.page import studio_files
from tests.servers import Scribe, client_of, client_to

TOKEN = "a-token-of-more-than-16"
GOOD = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:8188", "localhost@evil.example"]
)
def test_another_name_is_refused_on_every_route_and_the_websocket(host):
    scribe = Scribe()
    with client_of(scribe, with_page=True) as client:
        for path in ("/", "/health", "/metrics", "/v1/models", "/studio/main.js", "/nothing"):
            assert client.get(path, headers={"host": host}).status_code == 421
        answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"host": host})
        assert answer.status_code == 421 and scribe.batches == []
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/live", headers={"host": host}):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8188", "localhost:1", "LOCALHOST", "[::1]:8188"])
def test_this_machines_names_are_served(host):
    with client_of(Scribe()) as client:
        assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1.evil.example", "file://", "x"]
)
def test_pages_of_other_origins_are_refused(origin):
    scribe = Scribe()
    with client_of(scribe) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a"}, headers={"origin": origin})
        assert answer.status_code == 403 and scribe.batches == []
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/live", headers={"origin": origin}):
            pass


def test_the_servers_own_page_is_not_refused():
    with client_of(Scribe()) as client:
        headers = {"host": "127.0.0.1:8188", "origin": "http://127.0.0.1:8188", "sec-fetch-site": "same-origin"}
        assert client.post("/v1/images/generations", json={"prompt": "a"}, headers=headers).status_code == 200
        with client.websocket_connect("/v1/live", headers=headers) as live:
            live.send_text('{"type": "ping"}')
            assert live.receive_json() == {"type": "pong"}


def test_a_picture_tag_of_another_site_is_refused():
    with client_of(Scribe()) as client:
        headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
        assert client.get("/metrics", headers=headers).status_code == 403


def test_with_a_token_nothing_is_drawn_or_told_without_it():
    scribe = Scribe()
    with client_of(scribe, rules=Rules(token=TOKEN), with_page=True) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong-token-of-16-characters"},
            {"Authorization": f"Basic {TOKEN}"},
        ):
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/v1/images/generations", json={"prompt": "a"}, headers=headers).status_code == 401
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/live", headers=headers):
                pass
        assert scribe.batches == []
        assert client.get("/v1/models", headers=GOOD).status_code == 200
        assert {client.get(path).status_code for path in ("/", "/health", "/studio/main.js")} == {200}
        protocols = ["onestroke", f"onestroke.token.{TOKEN}"]
        with client.websocket_connect("/v1/live", subprotocols=protocols) as live:
            assert live.accepted_subprotocol == "onestroke"  # the token is not sent back
        with client.websocket_connect("/v1/live", headers=GOOD):
            pass


def test_a_body_that_is_too_long_is_refused_declared_or_not():
    scribe = Scribe()
    with client_of(scribe, rules=Rules(body_bytes=1000)) as client:
        body = b'{"prompt": "' + b"a" * 2000 + b'"}'
        headers = {"content-type": "application/json"}
        assert client.post("/v1/images/generations", content=body, headers=headers).status_code == 413
        chunks = (body[i : i + 100] for i in range(0, len(body), 100))
        assert client.post("/v1/images/generations", content=chunks, headers=headers).status_code == 413
        assert scribe.batches == []


def test_an_open_address_needs_a_token_that_headers_can_carry():
    check_token(None, "127.0.0.1")
    check_token(TOKEN, "0.0.0.0")
    with pytest.raises(RecipeError, match="can be reached from other machines"):
        check_token(None, "0.0.0.0")
    for token in ("short", "with spaces in it all over", "x" * 300):
        with pytest.raises(RecipeError, match="Take 16 to 256"):
            check_token(token, "127.0.0.1")
    assert [is_local(host) for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "::", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_names_and_origins_are_read_as_browsers_write_them():
    assert [name_of(host) for host in ("A.example:80", "[::1]:8188", "a.", "[bad")] == ["a.example", "::1", "a", ""]
    assert same_origin("http://a:8188", "a:8188") and same_origin("https://a", "a:443") and same_origin("http://A", "a")
    assert not same_origin("http://a:8188", "a:8189") and not same_origin("ftp://a", "a")


def test_a_busy_port_is_said_before_a_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ResourceError, match="is in use. Choose another --port"):
            listen(Address(port=taken.getsockname()[1]))


@pytest.mark.parametrize("command", ["serve", "studio"])
def test_the_commands_refuse_an_open_address_without_a_token(command, monkeypatch):
    monkeypatch.delenv("ONESTROKE_TOKEN", raising=False)
    with pytest.raises(RecipeError, match="--token"):
        command_line([command, "--host", "0.0.0.0", "--port", "0"], standalone_mode=False)


def test_the_page_is_packaged_whole_and_names_no_other_address():
    files = studio_files()
    assert {"index.html", "main.js", "studio.css", "fonts/bangers.ttf", "fonts/bangers-OFL.txt"} <= set(files)
    for name, content in files.items():
        if not name.endswith((".ttf", ".txt")):
            text = content.decode().replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text and "innerHTML" not in text, name


@pytest.mark.parametrize(
    "path", ["/studio/../page.py", "/studio/%2e%2e/page.py", "/studio//etc/passwd", "/studio/", "/studio/x"]
)
def test_no_path_in_a_request_is_opened(path):
    with client_of(Scribe(), with_page=True) as client:
        assert client.get(path).status_code == 404


def test_every_answer_forbids_foreign_script_and_frames():
    with client_of(Scribe(), with_page=True) as client:
        for path in ("/", "/health", "/nothing"):
            policy = client.get(path).headers["content-security-policy"]
            assert "script-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert client.get("/health", headers={"host": "evil.example"}).headers["x-content-type-options"] == "nosniff"


def test_without_the_studio_there_is_no_page():
    assert not any(getattr(route, "path", "") == "/" for route in build_app([Scribe()]).routes)


def test_the_studio_command_serves_what_it_prints(monkeypatch):
    monkeypatch.setattr(serve, "drawer_of", lambda model, **settings: Scribe(model))
    seen = {}

    def run(server, sockets):
        seen.update(app=server.config.app, port=sockets[0].getsockname()[1], ws_max_size=server.config.ws_max_size)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    console = Console(file=io.StringIO(), width=200)
    address = Address("127.0.0.1", 0, ("draw.example",), TOKEN)
    serve.run_serve(serve.Offer("embedded", "embedded-teacher", address, with_page=True), console=console)
    assert f"http://draw.example:{seen['port']}/#token={TOKEN}" in console.file.getvalue()
    assert seen["ws_max_size"] == 8 * 2**20
    with client_to(seen["app"], headers=GOOD | {"host": f"draw.example:{seen['port']}"}) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["embedded", "embedded-teacher"]
        assert client.get("/").status_code == 200
        assert client.get("/v1/models", headers={"authorization": "none"}).status_code == 401
