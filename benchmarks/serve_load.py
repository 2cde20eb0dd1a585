"""The server under load: throughput beside a bare loop, pictures alone and in company, and a crowd of restless clients.

    python benchmarks/serve_load.py [throughput] [equality] [soak] [--model embedded] [--clients 64] [--minutes 5]

throughput: pictures a second of a bare loop over the pipeline at each batch size; then, in turn, of it and of the
server at the best one.
equality: each of --requests pictures drawn with others against the same one drawn alone (`strict`), in dB.
soak: --clients connections, half of which supersede and disconnect at random. Every picture must be the one that was
asked for, every request of a connection that stayed must have one answer, and the server's memory must stay flat.
Leaves with 1 where equality is below 35 dB or soak finds a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import websockets
from PIL import Image

from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.commands.serve import drawer_of
from onestroke.serve.drawer import Drawer
from onestroke.serve.order import Order

SIZES = (1, 2, 4, 8, 16, 32)  # batches of the bare loop
ROUNDS = 7  # of bare loop and server in turn, for the machine's pace drifts
PARTS = ("throughput", "equality", "soak")
PANELS = 48  # that one connection asks for at a time; three batches in all are on the way
LEAST_DB = 35.0
FLAT = 1.05  # the last quarter's memory over the second quarter's
SUBJECTS = ("a laughing person", "an angry man with a beard", "a woman with a hat", "a sad person in a green hoodie")
DETAILS = (
    "pink hair",
    "round glasses",
    "a yellow background",
    "short black hair",
    "a blue background",
    "a striped top",
)


def prompt_of(rng: random.Random) -> str:
    return f"{rng.choice(SUBJECTS)}, {rng.choice(DETAILS)}, {rng.choice(DETAILS)}"


@contextmanager
def serving(model: str, max_batch: int) -> Iterator[tuple[str, int]]:
    """`onestroke serve` in a process of its own: its WebSocket's address and process id."""
    command = [sys.executable, "-m", "onestroke", "serve", model, "--port", "0", "--max-batch", str(max_batch),
               "--max-queue", "512"]  # fmt: skip
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # its address is wanted at once
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        port = next(int(found[1]) for line in process.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        address = f"ws://127.0.0.1:{port}/v1/live"
        asyncio.run(first_picture(address))
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(20)


async def first_picture(address: str) -> None:
    for _ in range(600):
        try:
            async with websockets.connect(address) as socket:
                await socket.send(json.dumps(draw_frame("p", 1, "a person", 1)))
                await asyncio.wait_for(socket.recv(), 120)
                return
        except OSError:
            await asyncio.sleep(0.1)
    sys.exit("the server does not answer")


def draw_frame(panel: str, number: int, prompt: str, seed: int, **fields) -> dict:
    return {"type": "draw", "panel": panel, "id": number, "prompt": prompt, "seed": seed} | fields


def read(answer: str | bytes) -> tuple[dict, bytes]:
    """The header of an answer, and the file that may follow it."""
    if isinstance(answer, str):
        return json.loads(answer), b""
    (length,) = struct.unpack(">I", answer[:4])
    return json.loads(answer[4 : 4 + length]), answer[4 + length :]


# throughput


def bare_loop(drawer: Drawer, batch: int, seconds: float) -> float:
    """Pictures a second of the plain pipeline called in a loop."""
    prompts = [prompt_of(random.Random(i)) for i in range(batch)]

    def draw() -> None:
        generators = [torch.Generator().manual_seed(i) for i in range(batch)]
        with torch.inference_mode():
            drawer.pipeline(
                prompts, num_inference_steps=drawer.steps, guidance_scale=drawer.guidance, generator=generators
            )

    draw()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        draw()
        count += batch
    return count / (time.perf_counter() - began)


async def saturate(address: str, waiting: int, seconds: float) -> float:
    """Pictures a second with `waiting` requests always on the way, by connections of PANELS requests at most."""
    shares = [min(PANELS, waiting - first) for first in range(0, waiting, PANELS)]
    return sum(await asyncio.gather(*(keep_asking(address, share, seconds) for share in shares)))


async def keep_asking(address: str, waiting: int, seconds: float) -> float:
    """Pictures a second of one connection."""
    rng = random.Random(0)
    async with websockets.connect(address, max_size=None) as socket:
        for number in range(waiting):
            await socket.send(json.dumps(draw_frame(f"p{number}", number, prompt_of(rng), number)))
        await asyncio.wait_for(drain(socket, rng, waiting), 600)  # the first round is not counted
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            header, _ = read(await socket.recv())
            assert header["type"] == "picture", header
            count += 1
            await socket.send(json.dumps(draw_frame(header["panel"], count + waiting, prompt_of(rng), count)))
        return count / (time.perf_counter() - began)


async def drain(socket, rng: random.Random, count: int) -> None:
    for _ in range(count):
        header, _ = read(await socket.recv())
        await socket.send(json.dumps(draw_frame(header["panel"], header["id"], prompt_of(rng), header["id"])))


def throughput(model: str, seconds: float) -> None:
    drawer, found = drawer_of(model), {}
    for batch in SIZES:
        found[batch] = bare_loop(drawer, batch, seconds / 2)
        print(f"  bare loop, batches of {batch:2}: {found[batch]:6.2f} pictures a second", flush=True)
    best = max(found, key=found.__getitem__)
    shares = []
    with serving(model, best) as (address, _):
        for _ in range(ROUNDS):
            bare = bare_loop(drawer, best, seconds)
            served = asyncio.run(saturate(address, 3 * best, seconds))
            shares.append(served / bare)
            print(f"  {bare:6.2f} by the bare loop, {served:6.2f} served: {shares[-1]:.2f}", flush=True)
    print(f"throughput: {statistics.median(shares):.2f} of the bare loop's pictures a second in batches of {best} "
          f"(median of {ROUNDS}, {min(shares):.2f} to {max(shares):.2f}; goal 0.90)")  # fmt: skip


# equality


async def pictures_of(address: str, asked: list[tuple[str, int]], *, strict: bool) -> tuple[list[np.ndarray], Counter]:
    """The picture of every prompt and seed, and how large their batches were."""
    found: dict[int, np.ndarray] = {}
    sizes: Counter = Counter()
    async with websockets.connect(address, max_size=None) as socket:
        for first in range(0, len(asked), 48):
            rows = range(first, min(len(asked), first + 48))
            for i in rows:
                await socket.send(json.dumps(draw_frame(f"p{i}", i, *asked[i], strict=strict)))
            for _ in rows:
                header, file = read(await socket.recv())
                found[header["id"]] = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), float)
                sizes[header["timings"]["batch_size"]] += 1
    return [found[i] for i in range(len(asked))], sizes


def equality(model: str, requests: int) -> bool:
    rng = random.Random(1)
    asked = [(prompt_of(rng), rng.randrange(2**32)) for _ in range(requests)]
    with serving(model, 16) as (address, _):
        company, sizes = asyncio.run(pictures_of(address, asked, strict=False))
        alone, _ = asyncio.run(pictures_of(address, asked, strict=True))
        again, _ = asyncio.run(pictures_of(address, asked[:20], strict=True))
    errors = [np.mean((one - two) ** 2) for one, two in zip(company, alone, strict=True)]
    least = 10 * np.log10(255**2 / max(*errors, 1e-9))
    same = all(np.array_equal(one, two) for one, two in zip(alone, again, strict=False))
    print(f"equality: {requests} pictures in batches of {dict(sorted(sizes.items()))} against alone: at least "
          f"{least:.1f} dB (goal {LEAST_DB:.0f}); strict twice {'the same bits' if same else 'DIFFERED'}")  # fmt: skip
    return bool(least >= LEAST_DB and same)


# soak


@dataclass
class Tally:
    """What the crowd saw."""

    asked: int = 0
    answers: Counter = field(default_factory=Counter)
    abandoned: int = 0  # of connections that their client left
    faults: list[str] = field(default_factory=list)
    sample: list[tuple[str, int, np.ndarray]] = field(default_factory=list)


async def client(address: str, number: int, until: float, restless: bool, tally: Tally) -> None:
    """One client with prompts and seeds of its own; a restless one supersedes and disconnects at random."""
    rng = random.Random(number)
    count = 0
    while time.monotonic() < until:
        waiting: dict[int, tuple[str, int]] = {}
        async with websockets.connect(address, max_size=None, open_timeout=60) as socket:
            for _ in range(rng.randint(5, 20) if restless else 10**9):
                if time.monotonic() >= until:
                    break
                for _ in range(rng.choice((1, 1, 2, 3)) if restless else 1):
                    count += 1
                    waiting[count] = (prompt_of(rng), rng.randrange(2**32))
                    await socket.send(json.dumps(draw_frame("panel", count, *waiting[count])))
                    tally.asked += 1
                if restless and rng.random() < 0.1:
                    break  # leaves while it waits
                while waiting:
                    take(await asyncio.wait_for(socket.recv(), 120), waiting, rng, tally)
            else:
                continue
        tally.abandoned += len(waiting)


def take(answer: str | bytes, waiting: dict[int, tuple[str, int]], rng: random.Random, tally: Tally) -> None:
    header, file = read(answer)
    tally.answers[header["type"]] += 1
    asked = waiting.pop(header.get("id"), None)
    if asked is None:
        tally.faults.append(f"an answer to nothing: {header}")
    elif header["type"] == "picture":
        image = Image.open(io.BytesIO(file))
        told = (image.text["prompt"], int(image.text["seed"]))
        if told != asked or header["seed"] != asked[1]:
            tally.faults.append(f"asked for {asked}, got {told}")
        if len(tally.sample) < 100 and rng.random() < 0.05:
            tally.sample.append((*asked, np.asarray(image.convert("RGB"), float)))
    elif header["type"] == "error" and "retry_after" not in header:
        tally.faults.append(f"an error: {header['message']}")


def resident_mb(process: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024


async def crowd(address: str, process: int, clients: int, minutes: float) -> tuple[Tally, list[float]]:
    tally, memory = Tally(), []
    until = time.monotonic() + 60 * minutes
    tasks = [asyncio.create_task(client(address, n, until, n % 2 == 1, tally)) for n in range(clients)]
    while not all(task.done() for task in tasks):
        memory.append(resident_mb(process))
        await asyncio.wait(tasks, timeout=max(0.2, minutes * 60 / 100))
        for task in tasks:
            if task.done() and task.exception() is not None:
                tally.faults.append(f"a client ended with {task.exception()!r}")
                task.exception()
    return tally, memory


def soak(model: str, clients: int, minutes: float) -> bool:
    with serving(model, 16) as (address, process):
        tally, memory = asyncio.run(crowd(address, process, clients, minutes))
    drawer = drawer_of(model)
    size = (drawer.canvas.default,) * 2
    for prompt, seed, shown in tally.sample:
        direct = drawer.draw([Order(drawer.name, prompt, seed, drawer.steps, size)])[0].astype(float)
        decibel = 10 * np.log10(255**2 / max(np.mean((direct - shown) ** 2), 1e-9))
        if decibel < LEAST_DB:
            tally.faults.append(f"{prompt!r} with seed {seed}: {decibel:.1f} dB from a direct call")
    lost = tally.asked - sum(tally.answers.values()) - tally.abandoned
    quarter = max(1, len(memory) // 4)
    growth = float(np.median(memory[-quarter:]) / np.median(memory[quarter : 2 * quarter] or memory))
    print(f"soak: {clients} clients for {minutes:g} minutes: {tally.asked} requests, {dict(tally.answers)}, "
          f"{tally.abandoned} left behind by their client, {lost} lost; {len(tally.sample)} compared with direct "
          f"calls; memory {min(memory):.0f} to {max(memory):.0f} MB, last quarter {growth:.3f} of second")  # fmt: skip
    for fault in tally.faults[:10]:
        print(f"  fault: {fault}")
    return not tally.faults and lost == 0 and growth <= FLAT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="throughput, equality, soak; all for none")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement of throughput")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    args = parser.parse_args()
    quiet_libraries()
    use_machine()
    parts = args.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose of {', '.join(PARTS)}")
    good = True
    if "throughput" in parts:
        throughput(args.model, args.seconds)
    if "equality" in parts:
        good &= equality(args.model, args.requests)
    if "soak" in parts:
        good &= soak(args.model, args.clients, args.minutes)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
