"""`onestroke serve --replicas`: several servers of one application on one machine, by Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import websockets
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import InvalidStatus

from onestroke.commands.replicas import Replicas
from onestroke.errors import RecipeError
from onestroke.serve.meters import Meters
from onestroke.serve.replica import joined
from tests.servers import picture_in, pixels_of, psnr

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'onestroke[ray]'")

TOKEN = "sixteen-letters-and-more"
PATIENCE = float(os.environ.get("ONESTROKE_RAY_SECONDS", "240"))  # of one wait, on a busy machine
SEEDS = range(4)


def families_in(text: str) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def totals(families: dict[str, Metric], name: str) -> dict[str, float]:
    """A counter's value by replica."""
    return {s.labels["replica"]: s.value for s in families[name].samples if s.name == f"{name}_total"}


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ((2, None, None), Replicas(2, 2, "local")),
        ((None, "1:4", "auto"), Replicas(1, 4, "auto")),
        ((None, None, "h:1"), Replicas(1, 1, "h:1")),
    ],
)
def test_how_many_replicas_an_option_asks_for(asked, given):
    assert Replicas.of(*asked) == given


@pytest.mark.parametrize("asked", [(None, "4", None), (None, "4:1", None), (None, "0:2", None), (2, "1:4", None)])
def test_a_range_that_is_none_is_refused(asked):
    with pytest.raises(RecipeError, match="--autoscale"):
        Replicas.of(*asked)


def test_the_meters_of_replicas_are_one_family_each_with_their_names():
    one, two = Meters(), Meters()
    one.dropped.inc(2)
    two.answers.labels("http", "200").inc(3)
    families = {
        f.name: f for f in text_string_to_metric_families(joined({"a": one.figures(), "b": two.figures()}).decode())
    }
    dropped = {s.labels["replica"]: s.value for s in families["onestroke_dropped"].samples if s.name.endswith("_total")}
    assert dropped == {"a": 2, "b": 0}
    (answers,) = [s for s in families["onestroke_answers"].samples if s.name.endswith("_total")]
    assert answers.labels == {"route": "http", "outcome": "200", "replica": "b"} and answers.value == 3


# two replicas


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen
    address: str

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers={"authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE)

    def descendants(self) -> dict[int, str]:
        """The processes below the command, by id, and what each calls itself."""
        parents, names = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:
                continue
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return {pid: names[pid] for pid in found - {self.process.pid}}


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Served]:
    """The command with the embedded student and a token."""
    command = [sys.executable, "-u", "-m", "onestroke", "serve", "embedded", "--port", "0", "--token", TOKEN, *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        assert re.fullmatch(r"embedded at http://\S+ by (2|1 to 2) replicas \(Ctrl-C stops\)\n", line), log.read_text()
        yield Served(process, line.split(" at ")[1].split()[0])
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("replicas") / "stderr.txt", "--replicas", "2") as served:
        yield served


def ask(client: httpx.Client, seed: int, **fields) -> tuple[str, np.ndarray]:
    """The replica that drew, and the picture."""
    answer = client.post("/v1/images/generations", json={"prompt": "a laughing person", "seed": seed} | fields)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-onestroke-replica"], picture_in(answer.json())


def names_of_all(client: httpx.Client) -> set[str]:
    return set(totals(families_in(client.get("/metrics").text), "onestroke_dropped"))


def test_clients_are_answered_by_both_replicas_and_a_seed_is_one_picture(served):
    def client_asks(number: int) -> list[tuple[int, str, np.ndarray]]:
        with served.client() as client:
            return [(seed, *ask(client, seed, strict=True)) for seed in SEEDS]

    drawn, deadline = defaultdict(dict), time.monotonic() + PATIENCE
    with ThreadPoolExecutor(8) as pool:
        while not all(len(drawn[seed]) == 2 for seed in SEEDS):
            assert time.monotonic() < deadline, {seed: list(drawn[seed]) for seed in SEEDS}
            for seed, name, picture in (row for rows in pool.map(client_asks, range(8)) for row in rows):
                assert np.array_equal(drawn[seed].setdefault(name, picture), picture)
    for one, two in (drawn[seed].values() for seed in SEEDS):
        assert np.array_equal(one, two)
    assert psnr(*(next(iter(drawn[seed].values())) for seed in (0, 1))) < 35
    with served.client() as client:
        assert names_of_all(client) == set(drawn[0])
        text = client.get("/metrics").text
        families = {f.name: f for f in text_string_to_metric_families(text)}
        counts = {
            s.labels["replica"]: s.value for s in families["onestroke_pictures"].samples if s.name.endswith("_total")
        }
        assert set(counts) == set(drawn[0]) and min(counts.values()) >= len(SEEDS)
        assert client.get("/ready").json() == {"ready": True}


def test_live_drawing_goes_through_a_replica(served):
    async def script() -> tuple[str, dict, np.ndarray]:
        live = served.address.replace("http", "ws") + "/v1/live"
        with pytest.raises(InvalidStatus, match="403"):
            await websockets.connect(live)
        protocols = ["onestroke", f"onestroke.token.{TOKEN}"]
        async with websockets.connect(live, subprotocols=protocols, max_size=None) as socket:
            assert socket.subprotocol == "onestroke"
            frame = {"type": "draw", "panel": "p", "id": 1, "prompt": "a laughing person", "seed": 2, "strict": True}
            await socket.send(json.dumps(frame))
            data = await asyncio.wait_for(socket.recv(), PATIENCE)
            (length,) = struct.unpack(">I", data[:4])
            return (
                socket.response.headers["x-onestroke-replica"],
                json.loads(data[4 : 4 + length]),
                pixels_of(data[4 + length :]),
            )

    name, header, picture = asyncio.run(script())
    assert header["type"] == "picture" and header["seed"] == 2
    with served.client() as client:
        assert name in names_of_all(client)
        assert np.array_equal(picture, ask(client, 2, strict=True)[1])


def test_the_guard_stands_before_every_replica(served):
    with served.client() as client:
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 421
        assert client.get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
        assert client.post("/v1/images/generations", content=b"x" * (8 * 2**20 + 1)).status_code == 413
        refused = client.post("/v1/images/generations", json={"prompt": ""})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_a_killed_replica_is_replaced_and_no_later_request_is_lost(served):
    with served.client() as client:
        before = names_of_all(client)
        victim = next(pid for pid, name in served.descendants().items() if is_replica(name))
        os.kill(victim, signal.SIGKILL)
        answered, deadline = set(), time.monotonic() + PATIENCE
        while len(answered - before) == 0 or len(names_of_all(client)) < 2:
            assert time.monotonic() < deadline
            answered.add(ask(client, 1)[0])  # each answered with 200
        assert len(before & names_of_all(client)) == 1 and len(names_of_all(client) - before) == 1


def test_ctrl_c_ends_all_of_it(served):
    port = int(served.address.rpartition(":")[2])
    below = served.descendants()
    assert sum(map(is_replica, below.values())) == 2
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(PATIENCE) == 0
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and "Z" not in status_of(pid) for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_where_more_is_asked_than_one_replica_draws_another_comes(tmp_path):
    options = ("--autoscale", "1:2", "--max-batch", "2")
    with serving(tmp_path / "stderr.txt", *options) as served, ThreadPoolExecutor(8) as pool:
        clients = [served.client() for _ in range(8)]
        (first,) = names_of_all(clients[0])
        names, deadline = {first}, time.monotonic() + PATIENCE
        while len(names) < 2:
            assert time.monotonic() < deadline
            names |= {name for name, _ in pool.map(lambda client: ask(client, 1), clients)}
        assert names == names_of_all(clients[0])


def is_replica(name: str) -> bool:
    """By the title that Ray gives its process: ray::ServeReplica... at rest, ray::SERVE_REPLICA... at work."""
    return name.startswith(("ray::ServeReplica", "ray::SERVE_REPLICA"))


def status_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
