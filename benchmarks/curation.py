"""Precision and recall of every curation stage on pictures with known answers, by transformation.

    python benchmarks/curation.py --count 200 [--size 256] [--out FOLDER]

The pictures are comicset's, spoilt in every way that a stage has to notice and in those that it must not mind. The
thresholds are set on one half of the originals and the numbers printed are those of the other; beside them stands what
the recipe's own thresholds come to.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.curation.captions import clean_caption
from onestroke.data.curation.decoding import Undecodable, decode
from onestroke.data.curation.duplicates import near_pairs
from onestroke.data.curation.examine import examine, stages_of
from onestroke.data.curation.listing import Entry
from onestroke.data.curation.near import SIDE
from onestroke.data.curation.recipe import MEASURED, CurationRecipe, Limit

NEAR_GOAL, QUALITY_GOAL = (0.98, 0.95), (0.95, 0.90)  # precision, recall
NEAR_FOUND = 0.985  # share of the copies that the threshold has to find; not all, as what is wrongly one is lost
QUALITY = ("blur", "flat", "borders", "text", "greyscale")
SAME = ("original", "reencoded", "resized", "cropped", "mirrored", "mirrored and cropped")  # one picture to look at


@dataclass(frozen=True)
class Answer:
    """What is known of one file."""

    file: str
    group: int  # number of its original
    stage: str  # that has to drop it; "near", "exact": it is a copy; "": none has
    kind: str  # the transformation
    caption: str = ""


# Making the set


def _file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    page = io.BytesIO()
    image.save(page, kind, **options)
    return page.getvalue()


def _cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Up to a tenth of each side away."""
    left, top, right, bottom = rng.uniform(0.01, 0.1, 4)
    width, height = image.size
    return image.crop((int(left * width), int(top * height), int((1 - right) * width), int((1 - bottom) * height)))


def _recolored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(rng.integers(50, 206))
    return Image.fromarray(pixels, "HSV").convert("RGB")


def _bordered(image: Image.Image, rng: np.random.Generator, *, sides: str) -> Image.Image:
    color = tuple(int(c) for c in rng.choice([(0, 0, 0), (255, 255, 255), (30, 60, 110), (200, 190, 170)]))
    if max(abs(a - b) for a, b in zip(color, image.getpixel((1, 1)), strict=True)) < 40:
        color = (0, 0, 0)
    across = int(image.width * rng.uniform(0.06, 0.2)) * (sides in ("frame", "left and right"))
    down = int(image.height * rng.uniform(0.06, 0.2)) * (sides in ("frame", "top and bottom"))
    return ImageOps.expand(image, (across, down, across, down), color)


def _text_page(size: int, caption: str, rng: np.random.Generator, *, dark: bool) -> Image.Image:
    ink, paper = ((240,) * 3, (25, 28, 40)) if dark else ((20,) * 3, (250, 248, 240))
    page = Image.new("RGB", (size, size), paper)
    draw, height = ImageDraw.Draw(page), int(rng.integers(max(8, size // 28), size // 16))
    font = ImageFont.load_default(height)
    words = (caption + " ").split() * 60
    rng.shuffle(words)
    for top in range(height, size - 2 * height, int(1.5 * height)):
        line = ""
        while draw.textlength(line + words[-1], font) < size - 2 * height:
            line += words.pop() + " "
            words = words or caption.split() * 60
        draw.text((height, top), line, ink, font)
    return page


def _sepia(image: Image.Image) -> Image.Image:
    return ImageOps.colorize(image.convert("L"), (45, 25, 10), (250, 235, 205))


def bomb(side: int = 40_000) -> bytes:
    """A PNG that says it has side x side pixels, and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _exif_turned(image: Image.Image) -> bytes:
    """Stored lying on its side, with a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _file(image.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def _files(image: Image.Image, caption: str, rng: np.random.Generator) -> Iterator[tuple[str, str, str, bytes]]:
    """Stage, kind, suffix and bytes of everything made of one picture."""
    size, jpeg = image.width, _file(image, "JPEG", quality=92)
    yield "", "original", "png", _file(image)
    yield "exact", "copied", "png", _file(image)
    yield "exact", "packed otherwise", "webp", _file(image, "WEBP", lossless=True, exact=True, method=0)
    yield "near", "reencoded", "jpg", _file(image, "JPEG", quality=int(rng.integers(40, 90)))
    smaller = int(size * rng.uniform(0.5, 0.9))
    yield "near", "resized", "png", _file(image.resize((smaller, smaller), Image.Resampling.BICUBIC))
    yield "near", "cropped", "png", _file(_cropped(image, rng))
    yield "near", "mirrored", "png", _file(ImageOps.mirror(image))
    both = ImageOps.mirror(_cropped(image, rng))
    yield "near", "mirrored and cropped", "jpg", _file(both, "JPEG", quality=int(rng.integers(60, 90)))
    yield "", "recolored", "png", _file(_recolored(image, rng))
    yield "blur", "blurred", "png", _file(image.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.012, 0.04))))
    tiny = size // int(rng.integers(6, 10))
    enlarged = image.resize((tiny, tiny), Image.Resampling.BOX).resize((size, size), Image.Resampling.BICUBIC)
    yield "blur", "enlarged", "jpg", _file(enlarged, "JPEG", quality=88)
    blank = Image.new("RGB", (size, size), tuple(int(c) for c in rng.integers(0, 256, 3)))
    yield "flat", "blank", "jpg", _file(blank, "JPEG", quality=80)
    noise = np.asarray(blank) + rng.normal(0, 3, (size, size, 3))
    yield "flat", "blank scan", "jpg", _file(Image.fromarray(noise.clip(0, 255).astype(np.uint8)), "JPEG", quality=75)
    for sides in ("frame", "top and bottom", "left and right"):
        yield "borders", f"border: {sides}", "jpg", _file(_bordered(image, rng, sides=sides), "JPEG", quality=85)
    for dark in (False, True):
        page = _text_page(size, caption, rng, dark=dark)
        yield "text", "text, light on dark" if dark else "text page", "png", _file(page)
    yield "greyscale", "grey", "jpg", _file(image.convert("L"), "JPEG", quality=90)
    yield "greyscale", "sepia", "jpg", _file(_sepia(image), "JPEG", quality=90)
    yield "decode", "truncated", "jpg", jpeg[: int(len(jpeg) * rng.uniform(0.2, 0.8))]
    yield "decode", "empty", "png", b""
    yield "decode", "no picture", "jpg", b"<html>404 not found</html>"
    yield "decode", "bomb", "png", bomb()
    yield "", "wrong suffix", "png", _file(image, "JPEG", quality=95)
    yield "", "CMYK", "jpg", _file(image.convert("CMYK"), "JPEG", quality=95)
    yield "", "palette", "gif", _file(image.quantize(255))
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
    yield "", "16 bits", "png", _file(Image.fromarray(sixteen))
    yield "", "animated", "webp", _file(image, "WEBP", save_all=True, append_images=[blank], lossless=True)
    yield "", "EXIF-turned", "jpg", _exif_turned(image)


_DECODED = ("wrong suffix", "CMYK", "palette", "16 bits", "animated", "EXIF-turned")
_CAPTIONS: tuple[tuple[str, str, str], ...] = (  # stage that drops it, kind, caption
    ("", "plain", "{}"),
    ("", "in tags", "1girl, solo, long_hair, blue_eyes, red_dress, smile, outdoors, highres"),
    ("", "huge", "{} " * 400),
    ("", "with boilerplate", "<b>{}</b> - stock photo, click to enlarge https://example.org/1.jpg"),
    ("captions", "empty", "   "),
    ("captions", "a file name", "IMG_2041.jpg"),
    ("captions", "nothing but boilerplate", "stock photo https://example.org © 2024 All rights reserved"),
    ("captions", "German", "ein lachender Mensch mit rosa Haaren und einer runden Brille"),
    ("captions", "French", "un dessin d'une fille aux cheveux longs qui sourit"),
    ("captions", "Spanish", "una chica con el pelo largo y los ojos azules"),
    ("captions", "Japanese", "青い髪の女の子が笑っている"),
    ("captions", "Cyrillic", "смеющийся человек с розовыми волосами"),
    ("captions", "Arabic", "شخص يضحك بشعر وردي"),
)


def write_known(out: Path, *, count: int, size: int = 256, seed: int = 0) -> list[Answer]:
    """Write `count` pictures in all their versions below `out`, with captions beside them; returns the answers."""
    source, answers = ComicSource(count, size=size, seed=seed), []
    out.mkdir(parents=True, exist_ok=True)
    for group in range(count):
        picture, rng = source.read(group), np.random.default_rng((seed, group))
        image = Image.fromarray(picture.image)
        for stage, kind, suffix, content in _files(image, picture.caption, rng):
            if kind == "recolored" and _colored(picture.image) < 0.1:
                continue  # turning the hue of what has none makes a copy
            if stage == "" and kind != "16 bits" and _colored(picture.image) < 0.005:
                stage = "greyscale"  # as it was drawn
            name = f"{group:05d}-{kind.replace(' ', '-').replace(':', '').replace(',', '')}.{suffix}"
            (out / name).write_bytes(content)
            (out / name).with_suffix(".txt").write_text(picture.caption, "utf-8")
            answers.append(Answer(name, group, stage, kind, picture.caption))
    return answers


def _colored(image: np.ndarray) -> float:
    """The share of pixels that are of a colour."""
    spread = image.max(axis=2).astype(int) - image.min(axis=2)
    return float((spread > 25).mean())


# Measuring


@dataclass(frozen=True)
class Line:
    """One printed row; `recall` of a kind that has to pass is the share that does."""

    stage: str
    kind: str
    num_pictures: int
    precision: float | None
    recall: float
    default_recall: float
    threshold: float | None = None


def threshold_of(bad: np.ndarray, good: np.ndarray) -> float:
    """The threshold above which a score is bad that makes the fewest mistakes; the middle where several do.

    Mistakes are counted as shares of either class.
    """
    values = np.unique(np.concatenate([bad, good]))
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    wrong = (bad[None] <= cuts[:, None]).mean(axis=1) + (good[None] > cuts[:, None]).mean(axis=1)
    best = np.flatnonzero(wrong <= wrong.min() + 1e-12)
    low, high = cuts[best[0]], cuts[best[-1]]
    return float((low + high) / 2)


def judge(answers: Sequence[Answer], folder: Path, recipe: CurationRecipe) -> list[Line]:
    """Every stage on every kind: thresholds from the even originals, numbers from the odd ones."""
    open_gates = {name: Limit(enabled=name in QUALITY) for name in MEASURED}  # everything is measured to the end
    stages = stages_of(recipe.model_copy(update=open_gates))
    entries = [Entry(str(folder), answer.file, "file", caption=answer.caption) for answer in answers]
    rows = [examine(entry, stages) for entry in entries]
    lines = list(_decode_lines(answers, rows, folder))
    for stage in QUALITY:
        lines += _quality_lines(stage, answers, rows, recipe)
    lines += _exact_lines(answers, rows)
    lines += _near_lines(answers, rows, recipe.near.at_most)
    return [*lines, *_caption_lines(recipe)]


def _decode_lines(answers, rows, folder: Path) -> Iterator[Line]:
    originals = {a.group: a.file for a in answers if a.kind == "original"}
    right = defaultdict(list)
    for answer, row in zip(answers, rows, strict=True):
        if answer.stage == "decode":
            right[answer.kind].append(row.get("dropped") == "decode")
        elif answer.kind in _DECODED:
            want = decode((folder / originals[answer.group]).read_bytes()).image
            right[answer.kind].append(_looks_like(folder / answer.file, want, grey=answer.kind == "16 bits"))
    for kind, found in right.items():
        yield Line("decode", kind, len(found), None, float(np.mean(found)), float(np.mean(found)))


def _looks_like(path: Path, want: np.ndarray, *, grey: bool) -> bool:
    try:
        image = decode(path.read_bytes()).image
    except Undecodable:
        return False
    if grey:
        want = np.asarray(Image.fromarray(want).convert("L").convert("RGB"))
    return image.shape == want.shape and np.abs(image.astype(int) - want).mean() < 6


def _quality_lines(stage: str, answers, rows, recipe: CurationRecipe) -> Iterator[Line]:
    limit = getattr(recipe, stage)
    sign = -1.0 if limit.at_least is not None else 1.0
    bound = sign * (limit.at_least if limit.at_least is not None else limit.at_most)
    groups = defaultdict(list)  # kind, half -> scores, high is bad; "" for what must pass
    for answer, row in zip(answers, rows, strict=True):
        if row.get(stage) is None or answer.kind == "16 bits":
            continue
        if answer.stage == stage:
            kind = answer.kind if answer.kind not in ("original", *_DECODED) else "drawn in grey"
            groups[kind, answer.group % 2].append(sign * row[stage])
        elif answer.stage in ("", "near", "exact") and not (stage == "greyscale" and answer.stage != ""):
            groups["", answer.group % 2].append(sign * row[stage])
    kinds = sorted({kind for kind, _ in groups if kind})
    bad = np.concatenate([groups[kind, 0] for kind in kinds])
    cut = threshold_of(bad, np.array(groups["", 0]))
    good = np.array(groups["", 1])
    found = sum((np.array(groups[kind, 1]) > cut).sum() for kind in kinds)
    precision = found / max(1, found + (good > cut).sum())
    for kind in (kind for kind in kinds if groups[kind, 1]):
        scores = np.array(groups[kind, 1])
        yield Line(stage, kind, len(scores), precision, (scores > cut).mean(), (scores > bound).mean(), sign * cut)
    yield Line(stage, "all that must pass", len(good), None, (good <= cut).mean(), (good <= bound).mean())


def _exact_lines(answers, rows) -> Iterator[Line]:
    keys = {a.group: r["pixels"] for a, r in zip(answers, rows, strict=True) if a.kind == "original" and "pixels" in r}
    owners = defaultdict(set)
    for answer, row in zip(answers, rows, strict=True):
        if "pixels" in row and answer.kind in ("original", "copied", "packed otherwise"):
            owners[row["pixels"]].add(answer.group)
    precision = float(np.mean([len(groups) == 1 for groups in owners.values()]))
    for kind in ("copied", "packed otherwise"):
        same = [r.get("pixels") == keys.get(a.group) for a, r in zip(answers, rows, strict=True)
                if a.kind == kind and a.group in keys]  # fmt: skip
        yield Line("exact", kind, len(same), precision, float(np.mean(same)), float(np.mean(same)))


def _near_lines(answers, rows, default: float) -> Iterator[Line]:
    shown = [k for k, answer in enumerate(answers)
             if answer.kind in (*SAME, "recolored") and rows[k].get("thumb")]  # fmt: skip
    thumbs = np.stack([np.frombuffer(rows[k]["thumb"], np.uint8).reshape(SIDE, SIDE, 3) for k in shown])
    pairs, apart = near_pairs(thumbs, np.arange(len(shown)), 80.0)
    found = {(i, j): value for (i, j), value in zip(pairs.tolist(), apart.tolist(), strict=True)}
    true, false = defaultdict(list), defaultdict(list)  # by kind and half: differences
    for (i, j), value in found.items():
        one, other = answers[shown[i]], answers[shown[j]]
        if one.group != other.group or "recolored" in (one.kind, other.kind):
            false[one.group % 2].append(value)
    for group in {answers[k].group for k in shown}:
        members = {answers[k].kind: n for n, k in enumerate(shown) if answers[k].group == group}
        for kind, n in members.items():
            if kind in SAME[1:] and "original" in members:
                pair = tuple(sorted((members["original"], n)))
                true[kind, group % 2].append(found.get(pair, 255.0))
    cut = float(np.quantile(np.concatenate([true[kind, 0] for kind in SAME[1:]]), NEAR_FOUND))
    right = sum((np.array(true[kind, 1]) <= cut).sum() for kind in SAME[1:])
    precision = right / max(1, right + (np.array(false[1]) <= cut).sum())
    for kind in SAME[1:]:
        values = np.array(true[kind, 1])
        yield Line("near", kind, len(values), precision, (values <= cut).mean(), (values <= default).mean(), cut)
    wrong = np.array(false[1] or [255.0])
    yield Line("near", "pairs that are none", len(false[1]), None, (wrong > cut).mean(), (wrong > default).mean())


def _caption_lines(recipe: CurationRecipe) -> Iterator[Line]:
    captions = [ComicSource(40).caption(index) for index in range(40)]
    for stage, kind, form in _CAPTIONS:
        found = [bool(clean_caption(form.format(*[text] * 400), recipe.captions).dropped) for text in captions]
        share = float(np.mean(found)) if stage else 1 - float(np.mean(found))
        yield Line("captions", kind, len(found), None, share, share)


def missed(lines: Sequence[Line]) -> list[str]:
    """Which goals are not met, in words."""
    goals = {"near": NEAR_GOAL, **dict.fromkeys((*QUALITY, "decode", "exact", "captions"), QUALITY_GOAL)}
    words = []
    for line in lines:
        precision, recall = goals[line.stage]
        if line.recall < recall or (line.precision is not None and line.precision < precision):
            words.append(f"{line.stage}, {line.kind}: precision {line.precision}, recall {line.recall:.3f}")
    return words


def print_lines(lines: Sequence[Line], write: Callable[[str], None] = print) -> None:
    write(
        f"{'stage':10} {'transformation':26} {'pictures':>8} {'precision':>9} {'recall':>7} {'default':>10} threshold"
    )
    for line in lines:
        precision = "" if line.precision is None else f"{line.precision:.3f}"
        cut = "" if line.threshold is None else f"{line.threshold:.3g}"
        write(f"{line.stage:10} {line.kind:26} {line.num_pictures:8} {precision:>9} {line.recall:7.3f} "
              f"{line.default_recall:10.3f} {cut:>9}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="originals")
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep the pictures and the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)) / "pictures"
        answers = write_known(folder, count=options.count, size=options.size, seed=options.seed)
        lines = judge(answers, folder, CurationRecipe())
        if options.out:
            (options.out / "answers.jsonl").write_text("".join(json.dumps(asdict(a)) + "\n" for a in answers), "utf-8")
    print(f"{len(answers)} pictures of {options.count} originals at {options.size} pixels")
    print_lines(lines)
    wrong = missed(lines)
    print("every goal is met" if not wrong else "not met: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
