"""From key press to painted picture in real Chromium, by part; and how far the picture lags while one types.

    python benchmarks/studio_latency.py [--model embedded] [--presses 60] [--seconds 20] [--rate 8] [--json FILE]

The server runs in this process, so that the seconds of text encoders, UNet and decoder can be taken where they pass. A
picture counts as painted after the first frame in which the panel's canvas holds it. Staleness is taken in each frame:
the time since the first key press whose words the shown picture does not have.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn
from playwright.sync_api import Page, sync_playwright

from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.commands.serve import drawer_of
from onestroke.serve.app import build_app
from onestroke.serve.batcher import Pace
from onestroke.serve.drawer import Drawer

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PARTS = ("key", "network", "queue", "text", "UNet", "decode", "rest of drawing", "encode", "paint")
GOALS = {"median": 120.0, "p95": 250.0, "staleness": 400.0}  # milliseconds, on 2 idle cores
WORDS = (
    "a laughing person with pink hair and round glasses, a yellow background",
    "portrait of an angry man with a beard in a green hoodie, blue background",
    "a smiling woman with short black hair and a hat, open peeps style",
    "a sad person with long blond hair wearing a striped top",
)
WATCH = """(() => {
  window.watch = { sent: {}, got: {}, presses: [], frames: [] };
  const after = (call) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = call;
    channel.port2.postMessage(0);
  });
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function (data) {
    if (!this.watched) {
      this.watched = true;
      this.addEventListener("message", ({ data }) => {
        const now = performance.now();
        if (typeof data === "string") return;
        const length = new DataView(data).getUint32(0);
        const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
        watch.got[header.id] = { at: now, timings: header.timings };
      });
    }
    const frame = JSON.parse(data);
    if (frame.type === "draw") watch.sent[frame.id] = { at: performance.now(), prompt: frame.prompt };
    return send.call(this, data);
  };
  const shown = () => watch.sent[document.querySelector(".panel canvas")?.picture?.header?.id]?.prompt ?? null;
  let pressed = 0;
  addEventListener("keydown", () => { pressed = performance.now(); }, true);
  addEventListener("input", ({ target }) => {
    if (target.id === "prompt") watch.presses.push({ at: pressed, prompt: target.value.trim(), painted: null });
  }, true);
  const frame = () => {
    const prompt = shown();
    const last = watch.presses.findLastIndex((press) => press.prompt === prompt);
    after(() => {
      const now = performance.now();
      for (const press of watch.presses) if (press.prompt === prompt && press.painted === null) press.painted = now;
      const next = watch.presses[last + 1];
      if (watch.typing) watch.frames.push(last >= 0 && next ? now - next.at : 0);
    });
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})();"""


@contextmanager
def serving(drawer: Drawer) -> Iterator[str]:
    """The studio on a free port of 127.0.0.1, as `onestroke studio` sets it up."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = build_app([drawer], pace=Pace(wait=0.002), with_page=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws_max_size=2**23))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not app.state.desk.is_warm:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


class PartTimes:
    """Seconds that each part of a pipeline took, added up over each picture."""

    def __init__(self, drawer: Drawer) -> None:
        self.found: list[dict[str, float]] = []
        pipeline = drawer.pipeline
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        for encoder in filter(None, encoders):
            self._watch(encoder, "forward", "text")
        self._watch(pipeline.unet, "forward", "UNet")
        self._watch(pipeline.vae, "decode", "decode")
        begin = drawer.begin

        def noted(orders):
            self.found.append(dict.fromkeys(("text", "UNet", "decode"), 0.0))
            return begin(orders)

        drawer.begin = noted

    def _watch(self, module: torch.nn.Module, method: str, part: str) -> None:
        call = getattr(module, method)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.found[-1][part] += time.perf_counter() - began
            return result

        setattr(module, method, timed)


def press_by_press(page: Page, parts: PartTimes, presses: int) -> list[dict[str, float]]:
    """Type so many letters, each once the last is painted; milliseconds of each picture by part."""
    found: list[dict[str, float]] = []
    text = iter(" ".join(WORDS[index % len(WORDS)] + f" {index}" for index in range(1 + presses // 40)))
    page.fill("#prompt", "")
    while len(found) < presses:
        letter = next(text)
        before, drawn = page.evaluate("watch.presses.length"), len(parts.found)
        page.keyboard.type(letter)
        deadline = time.monotonic() + 60
        while not page.evaluate(f"watch.presses.length > {before} && watch.presses.at(-1).painted !== null"):
            if time.monotonic() > deadline:
                sys.exit("no picture came within a minute")
            page.wait_for_timeout(5)
        if len(parts.found) != drawn + 1:
            continue  # a space: the same words, no picture
        press, sent, got = page.evaluate("""() => {
          const press = watch.presses.at(-1), id = Math.max(...Object.keys(watch.sent).map(Number));
          return [press, watch.sent[id], watch.got[id]];
        }""")
        told, timings = {name: 1000 * seconds for name, seconds in parts.found[-1].items()}, got["timings"]
        server = timings["queue"] + timings["draw"] + timings["encode"]
        found.append({
            "key": sent["at"] - press["at"], "network": got["at"] - sent["at"] - server, "queue": timings["queue"],
            **told, "rest of drawing": timings["draw"] - sum(told.values()), "encode": timings["encode"],
            "paint": press["painted"] - got["at"], "whole": press["painted"] - press["at"],
        })  # fmt: skip
    return found


def while_typing(page: Page, seconds: float, rate: float) -> list[float]:
    """Staleness of every frame in milliseconds, at so many letters a second."""
    page.fill("#prompt", "")
    page.wait_for_timeout(1500)
    page.evaluate("void Object.assign(watch, { presses: [], frames: [], typing: true })")
    text = " ".join(f"{words} {index}" for index in range(1, 50) for words in WORDS)
    page.keyboard.type(text[: int(seconds * rate)], delay=1000 / rate)
    return page.evaluate("watch.frames")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--presses", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20.0, help="of typing without pause")
    parser.add_argument("--rate", type=float, default=8.0, help="letters a second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("there is no Chromium: apt-get install chromium")
    quiet_libraries()
    use_machine()
    drawer = drawer_of(args.model)
    parts = PartTimes(drawer)
    with serving(drawer) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(WATCH)
        page.goto(address)
        page.wait_for_selector("#panel-state[data-state=current]")
        page.click("#prompt")
        press_by_press(page, parts, 3)  # warm
        found = press_by_press(page, parts, args.presses)
        stale = while_typing(page, args.seconds, args.rate)
        browser.close()
    report = told(found, stale, args.rate)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def told(found: list[dict[str, float]], stale: list[float], rate: float) -> dict:
    print(f"{len(found)} key presses, milliseconds        median    95%")
    report: dict = {"presses": len(found), "parts": {}}
    for part in (*PARTS, "whole"):
        middle, high = np.percentile([one[part] for one in found], [50, 95])
        report["parts"][part] = {"median": middle, "p95": high}
        print(f"  {part:34} {middle:6.1f} {high:6.1f}")
    print(f"  goal on 2 idle cores {'':13} {GOALS['median']:6.1f} {GOALS['p95']:6.1f}")
    report["staleness"] = {"median": float(np.median(stale)), "max": float(max(stale)), "frames": len(stale)}
    print(f"typing {rate:g} letters a second, {len(stale)} frames: the shown picture is at most "
          f"{max(stale):.0f} ms behind (median {np.median(stale):.0f}; goal {GOALS['staleness']:.0f})")  # fmt: skip
    return report


if __name__ == "__main__":
    main()
