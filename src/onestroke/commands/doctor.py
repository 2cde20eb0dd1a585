"""`onestroke doctor`: what is installed, what works on this machine, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # the doctor starts, and reports, without torch
    import torch
    from packaging.requirements import Requirement

GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16", "float64")
WEIGHTS = ("teacher/model_index.json", "student/unet/config.json", "judge.safetensors")


@dataclass(frozen=True)
class Finding:
    """One row. `ok` is None for what is neither good nor bad; `fix`: how to get what is missing, one line."""

    topic: str
    state: str
    ok: bool | None = None
    fix: str = ""


def run_doctor(console: Console) -> None:
    """Print a table of what there is, and a line for everything that is missing. Fetches nothing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = list(findings())
    table = Table("", "what", "state")
    for finding in found:
        mark = {True: "[green]ok[/green]", False: "[yellow]no[/yellow]", None: ""}[finding.ok]
        table.add_row(mark, finding.topic, finding.state)
    console.print(table)
    missing = [finding for finding in found if finding.fix]
    console.print("What is missing, and how to get it:" if missing else "Nothing is missing.")
    for finding in missing:
        console.print(f"  {finding.topic}: {finding.fix}", markup=False, highlight=False, soft_wrap=True)


def findings() -> Iterator[Finding]:
    """All rows; a part that needs a package which is not there says so."""
    for part in (python, packages, machine, devices, precisions, compiler, feature_networks, embedded_weights, extras):
        try:
            yield from part()
        except ImportError as error:
            name = (error.name or str(error)).split(".")[0]
            yield Finding(
                part.__name__.replace("_", " "), f"cannot look: {name} is not installed", False, f"pip install {name}"
            )


def python() -> Iterator[Finding]:
    """The interpreter and this package."""
    version = platform.python_version()
    old = sys.version_info < (3, 11)
    yield Finding("python", f"{version}, {sys.executable}", not old, "Install Python 3.11 or newer." if old else "")
    yield Finding("system", platform.platform())


def packages() -> Iterator[Finding]:
    """What onestroke needs, with versions."""
    versions = {requirement.name: _version(requirement.name) for requirement, extra in _requirements() if not extra}
    if not versions:
        yield Finding("onestroke", "not installed, run from its source", False, "pip install -c constraints.txt -e .")
    present = [f"{name} {version}" for name, version in versions.items() if version]
    if present:
        yield Finding("packages", ", ".join(present), True)
    for name in (name for name, version in versions.items() if not version):
        yield Finding(name, "not installed", False, f"pip install {name}")


def machine() -> Iterator[Finding]:
    """Cores, memory, disk."""
    import torch

    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "cores", f"{granted} for this process, {os.cpu_count()} in all; torch uses {torch.get_num_threads()} threads"
    )
    total, free = memory()
    low = free is not None and free < 6 * GIB
    state = f"{total / GIB:.1f} GiB" + ("" if free is None else f", {free / GIB:.1f} GiB free")
    yield Finding("memory", state, not low, "Close other programs: `onestroke demo` takes up to 6 GiB." if low else "")
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        "disk",
        f"{disk / GIB:.1f} GiB free here",
        disk > GIB,
        "" if disk > GIB else "Free some space: a run keeps two checkpoints.",
    )


def memory() -> tuple[int, int | None]:
    """Bytes of memory, and of it available (None where the system does not tell); a container's limit counts."""
    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    page = Path("/proc/meminfo")
    if page.exists():
        line = next(line for line in page.read_text().splitlines() if line.startswith("MemAvailable"))
        free = 1024 * int(line.split()[1])
    limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None and limit < total:
        total, free = limit, min(free or limit, limit - used)
    return total, free


def devices() -> Iterator[Finding]:
    """GPUs."""
    import torch

    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB", True)
    if torch.backends.mps.is_available():
        yield Finding("mps", f"Apple GPU, {torch.mps.recommended_max_memory() / GIB:.0f} GiB", True)
    if len(_devices()) == 1:
        yield Finding("GPU", "none; the embedded models need none")


def precisions() -> Iterator[Finding]:
    """Which dtypes compute, on each device, and the faster one on the CPU."""
    import torch

    from onestroke.precision import fast_dtype

    for device in _devices():
        works = {name: dtype_works(device, getattr(torch, name)) for name in DTYPES}
        failing = [name for name, fine in works.items() if not fine]
        state = ", ".join(name for name, fine in works.items() if fine) + " work"
        yield Finding(f"dtypes on {device}", state + (f"; not {', '.join(failing)}" if failing else ""), True)
    seconds = cpu_seconds()
    best = min(seconds, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    chosen = str(fast_dtype("cpu")).removeprefix("torch.")
    advice = "" if best == chosen else f"; train with --set train.precision={best}"
    yield Finding("fastest on the CPU", f"{best} ({times} for a small convolutional net){advice}")


def dtype_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix product and a convolution run in `dtype` and come out right."""
    import torch

    try:
        square = torch.ones(8, 8, device=device, dtype=dtype)
        image = torch.ones(1, 4, 8, 8, device=device, dtype=dtype)
        convolved = torch.nn.functional.conv2d(image, torch.ones(4, 4, 1, 1, device=device, dtype=dtype))
        return bool((square @ square == 8).all()) and bool((convolved == 4).all())
    except (RuntimeError, TypeError):  # what torch raises for a dtype that a device lacks
        return False


def cpu_seconds(*, budget: float = 1.0) -> Mapping[str, float]:
    """Median seconds of one training pass of a small net under bfloat16 autocast and in float32, run in turn."""
    import torch
    from torch import nn

    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()]
    net = nn.Sequential(*layers, nn.Conv2d(32, 3, 3, padding=1)).to(memory_format=torch.channels_last)
    images = torch.ones(4, 3, 64, 64).to(memory_format=torch.channels_last)

    def seconds(name: str) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            loss = net(images).float().square().mean()
        loss.backward()
        return time.perf_counter() - started

    names, runs = ("bfloat16", "float32"), []
    started = time.perf_counter()
    while len(runs) < 3 or (time.perf_counter() - started < budget and len(runs) < 50):
        runs.append([seconds(name) for name in names])
    return {name: median(run[i] for run in runs[1:]) for i, name in enumerate(names)}


def compiler() -> Iterator[Finding]:
    """What torch.compile needs: a C++ compiler, and triton on a CUDA GPU."""
    import torch

    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    found = next(filter(None, map(shutil.which, names)), None)
    fix = "Install g++ (apt-get install g++); onestroke runs without."
    yield Finding("torch.compile", found or "no C++ compiler", found is not None, "" if found else fix)
    if torch.cuda.is_available():
        there = find_spec("triton") is not None
        yield Finding("triton", "installed" if there else "not installed", there, "" if there else "pip install triton")


def feature_networks() -> Iterator[Finding]:
    """The discriminator's feature networks and the text encoder of the SDXL recipe: loadable now, with no network?"""
    from onestroke.config import load_recipe
    from onestroke.distill.features import DINOV2_SOURCES, load_features
    from onestroke.errors import ModelError

    try:
        load_features("efficientnet-lite0")
        yield Finding("efficientnet-lite0", "loads", True)
    except ModelError as error:
        yield Finding("efficientnet-lite0", error.what, False, error.fix)
    clip = load_recipe("sdxl-anime").discriminator.text_encoder
    for name, source in {**DINOV2_SOURCES, clip.rsplit("/", 1)[-1]: clip}.items():
        there = is_cached(source)
        state = "loads offline" if there else "not on this machine; the recipes sdxl-anime and sd15 want it"
        yield Finding(name, state, there, "" if there else f"hf download {source}   # once, with a network")


def is_cached(source: str) -> bool:
    """Whether a hub model's config and safetensors weights are on the disk, and whole enough to be opened."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from safetensors import SafetensorError, safe_open

    try:
        hf_hub_download(source, "config.json", local_files_only=True)
        with safe_open(hf_hub_download(source, "model.safetensors", local_files_only=True), "pt"):
            return True
    except (EntryNotFoundError, OSError, SafetensorError):
        return False


def embedded_weights() -> Iterator[Finding]:
    """The shipped teacher, student and judge."""
    from onestroke import embedded

    folder = embedded.weights_folder()
    missing = [name.split("/")[0].split(".")[0] for name in WEIGHTS if not (folder / name).is_file()]
    if missing:
        yield Finding(
            "embedded weights",
            f"no {', '.join(missing)}",
            False,
            "pip install --force-reinstall --no-deps onestroke, or train them: onestroke pretrain",
        )
        return
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    yield Finding("embedded weights", f"teacher, student and judge, {size / 1e6:.0f} MB", True)


def extras() -> Iterator[Finding]:
    """The package's optional parts, as its own metadata lists them."""
    wanted: dict[str, list[str]] = {}
    for requirement, extra in _requirements():
        if extra:
            wanted.setdefault(extra, []).append(requirement.name)
    for extra, names in wanted.items():
        missing = [name for name in names if _version(name) is None]
        state = "installed" if not missing else f"optional; without {', '.join(missing)}"
        yield Finding(
            f"extra {extra}", state, None if missing else True, f'pip install "onestroke[{extra}]"' if missing else ""
        )


def _devices() -> list[torch.device]:
    import torch

    there = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    there += [torch.device("mps")] if torch.backends.mps.is_available() else []
    return [*there, torch.device("cpu")]


def _requirements() -> list[tuple[Requirement, str]]:
    """The package's requirements, each with the extra it belongs to ("" for what is always needed)."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("onestroke") or ()
    except metadata.PackageNotFoundError:
        return []
    return [(requirement, _extra(requirement)) for requirement in map(Requirement, lines)]


def _extra(requirement: Requirement) -> str:
    marker = str(requirement.marker or "")
    return marker.split("extra ==")[1].split('"')[1] if "extra ==" in marker else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None
