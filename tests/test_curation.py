"""A curation from end to end: what comes out, and that it comes out the same however often it is stopped."""

import fcntl
import hashlib
import io
import json
import os
import re
import signal
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from known_curation import curation_benchmark
from PIL import Image, ImageOps
from rich.console import Console
from test_curation_stages import _Server, packed, scene, server  # noqa: F401 - a fixture

from onestroke.commands.curate import run_curate
from onestroke.commands.inspection import run_inspect
from onestroke.data import batches, open_folder
from onestroke.data.buckets import assign, sdxl_buckets
from onestroke.data.curation import examine, files, finish, run
from onestroke.data.curation.inspection import contact_sheet, described, inspect
from onestroke.data.curation.listing import list_source, read_bytes
from onestroke.data.curation.processes import Processes
from onestroke.data.curation.recipe import CurationRecipe
from onestroke.data.curation.run import curate
from onestroke.data.facts import measured_sizes
from onestroke.errors import CheckpointError, DataError, RecipeError, ResourceError


def recipe(**sections):
    """Small shards and pictures, of scenes: smooth by nature."""
    base = {"size": {"at_least": 32}, "blur": {"enabled": False}, "output": {"shard_size": 4}}
    return CurationRecipe.model_validate({**base, **sections})


@pytest.fixture(scope="module")
def heap(tmp_path_factory):
    """Ten sound pictures in every sort of source, and six that are dropped."""
    root = tmp_path_factory.mktemp("heap")
    folder = root / "folder"
    (folder / "deep").mkdir(parents=True)
    for k in range(6):
        scene(k, 48 + k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"scene number {k}")
    scene(2, 50).save(folder / "again.png")  # the bytes of 2.png
    (folder / "again.txt").write_text("once more")
    ImageOps.mirror(scene(3, 40)).save(folder / "mirror.jpg", quality=90)
    (folder / "mirror.txt").write_text("scene number 3 in the mirror")
    (folder / "cut.jpg").write_bytes(packed(scene(1), "JPEG")[:300])
    (folder / "cut.txt").write_text("a cut file")
    scene(20, 16).save(folder / "small.png")
    (folder / "small.txt").write_text("too small")
    scene(21).save(folder / "silent.png")
    scene(6).save(folder / "deep" / "wrong.png", "JPEG", quality=95)
    (folder / "deep" / "metadata.jsonl").write_text('{"file_name": "wrong.png", "text": "1girl, solo, blue_eyes"}\n')
    with tarfile.open(root / "part.tar", "w") as tar:
        for name, content in (
            ("a.webp", packed(scene(7), "WEBP", lossless=True)),
            ("a.json", b'{"tags": ["red_sky", "no_humans", "sea"]}'),
            ("b.png", packed(scene(8).convert("CMYK"), "TIFF")), ("b.txt", b"a tiff called png"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rows = [{"image": {"bytes": packed(scene(9)), "path": "x.png"}, "text": "from a table"},
            {"image": {"bytes": None, "path": "y.png"}, "text": "no bytes"}]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")
    return [str(root / name) for name in ("folder", "part.tar", "rows.parquet")]


def quiet(line):
    pass


def run_quietly(heap, out, **how):
    return curate(heap, out, log=quiet, **{"recipe": recipe(), **how})


def digests(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.tar")} | {
        "index": hashlib.sha256((out / "index.parquet").read_bytes()).hexdigest()
    }


@pytest.fixture(scope="module")
def whole(heap, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run_quietly(heap, out)


def test_what_is_sound_comes_out_and_the_rest_is_dropped_by_the_right_stage(whole):
    out, outcome = whole
    rows = {row["file"] or row["source"].rpartition("/")[2]: row for row in
            sorted(parquet.read_table(out / "index.parquet").to_pylist(), key=lambda row: -row["place"])}  # fmt: skip
    assert (outcome.num_pictures, outcome.num_kept) == (16, 10)
    assert outcome.dropped == {"read": 1, "decode": 1, "size": 1, "captions": 1, "exact": 1, "near": 1}
    dropped = {name: row["dropped"] for name, row in rows.items() if row["dropped"]}
    assert dropped == {"again.png": "exact", "mirror.jpg": "near", "cut.jpg": "decode", "small.png": "size",
                       "silent.png": "captions"}  # fmt: skip
    assert rows["mirror.jpg"]["copy_of"] == rows["3.png"]["place"]
    assert rows["small.png"]["reason"] == "16, not at least 32"


def test_the_trainer_reads_what_came_out(whole):
    out, outcome = whole
    source = open_folder(out, log=quiet)
    captions = [source.caption(index) for index in range(len(source))]
    assert len(source) == outcome.num_kept == 10 and not source.left_out
    assert {"a girl with blue eyes", "red sky, no humans, sea", "a tiff called png", "from a table"} < set(captions)
    images = {source.read(index).caption: source.read(index).image for index in range(len(source))}
    assert np.array_equal(images["scene number 4"], np.asarray(scene(4, 52)))
    assert np.abs(images["a tiff called png"].astype(int) - np.asarray(scene(8))).max() <= 1


def test_sound_files_are_kept_byte_for_byte_and_others_become_png(whole, heap):
    out, _ = whole
    members = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    pages = {name: json.loads(content) for name, content in members.items() if name.endswith(".json")}
    for name, page in pages.items():
        kind = next(kind for kind in (".png", ".jpg", ".webp") if name.replace(".json", kind) in members)
        content = members[name.replace(".json", kind)]
        is_same = hashlib.sha256(content).hexdigest() == page["sha256"]
        assert is_same == ("tiff" not in page["text"]) and content[:4] != b"II*\0"
        assert members[name.replace(".json", ".txt")].decode() == page["text"]
        if page["source"].endswith("wrong.png"):
            assert kind == ".jpg" and page["repairs"] == "name, caption: tags"


def test_the_page_stands_alone_and_shows_every_stage(whole):
    page = (whole[0] / "curation.html").read_text("utf-8")
    assert not re.search(r"(?:src|href)=['\"](?!data:)", page) and "<script" not in page
    assert "10 of 16 pictures kept" in page and page.count("data:image/webp") > 15
    for words in ("Near copies", "16, not at least 32", "no caption", "just dropped", "machines like this"):
        assert words in page


def test_nothing_but_the_result_is_left(whole):
    names = sorted(path.name for path in whole[0].iterdir() if path.name != ".onestroke")  # what readers found out
    assert names == [".lock", "curated-00000.tar", "curated-00001.tar", "curated-00002.tar", "curation.html",
                     "curation.json", "index.parquet"]  # fmt: skip


def test_workers_change_nothing(whole, heap, tmp_path):
    assert run_quietly(heap, tmp_path / "out", engine=Processes(2)) == whole[1]
    assert digests(tmp_path / "out") == digests(whole[0])


def killed_at(step, heap, out):
    """Run in a process that kills itself as file number `step` has been written but not taken its name."""
    child = os.fork()
    if not child:
        count, replace = [0], os.replace

        def replace_or_die(*names):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = replace_or_die
        try:
            run_quietly(heap, out)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_run_killed_at_any_file_goes_on_to_the_same_bytes(whole, heap, tmp_path):
    # marker; listing, clock, 4 measured, clock; rows, words, near pairs, clock, copies, close calls, picked;
    # 3 times shard and record, clock; index, clock, page, marker
    out, seen = tmp_path / "out", set()
    for step in (1, 3, 6, 2, 4, 5, 7, 2, 4, 5, 2, 3):  # each a little further
        assert killed_at(step, heap, out) == -signal.SIGKILL
        for path in out.glob("*.tar"):  # whatever is visible is whole
            seen.add(path.name)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digests(whole[0])[path.name]
    assert len(seen) == 3
    assert run_quietly(heap, out) == whole[1]
    assert digests(out) == digests(whole[0])
    assert not list(out.rglob("*.tmp"))


def test_a_finished_run_is_not_done_again(whole, heap, monkeypatch):
    monkeypatch.setattr(run, "write_listing", None)
    before = digests(whole[0])
    assert run_quietly(heap, whole[0]) == whole[1] and digests(whole[0]) == before


def test_a_full_disk_loses_nothing(whole, heap, tmp_path, monkeypatch):
    out, room = tmp_path / "out", [9]

    def fsync(number):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(ResourceError, match="no room left.*goes on where it stopped"):
        run_quietly(heap, out)
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.html"))
    monkeypatch.undo()
    assert run_quietly(heap, out) == whole[1] and digests(out) == digests(whole[0])


def test_a_second_run_into_the_folder_is_refused(heap, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another run is writing"):
            run_quietly(heap, tmp_path / "out")


def test_a_folder_that_holds_something_else_is_refused(whole, heap, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"something else \(mine.txt\)"):
        run_quietly(heap, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="curation of other recipe"):
        run_quietly(heap, whole[0], recipe=recipe(size={"at_least": 33}))
    with pytest.raises(DataError, match="curation of other sources"):
        run_quietly(heap[:1], whole[0])
    with pytest.raises(DataError, match="lie in one another"):
        run_quietly(heap, heap[0] + "/out")


def test_a_source_that_is_not_there_or_vanishes_is_named(heap, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such source"):
        run_quietly([str(tmp_path / "none")], tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        run_quietly([str(tmp_path / "empty")], tmp_path / "b")
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(3):
        scene(k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"number {k}")
    entries = list(list_source(str(folder), quiet))
    (folder / "1.png").unlink()
    assert examine.examine(entries[1], examine.stages_of(recipe()))["dropped"] == "read"  # one file: counted
    folder.rename(tmp_path / "gone")
    with pytest.raises(DataError, match="vanished while it was read.*goes on"):
        read_bytes(entries[0])


def test_a_file_that_changes_between_the_passes_is_dropped(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    for k in range(3):
        scene(k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"number {k}")
    real = run._Job.write

    def write(job, count):
        scene(77).save(folder / "1.png")
        return real(job, count)

    monkeypatch.setattr(run._Job, "write", write)
    outcome = run_quietly([str(folder)], tmp_path / "out")
    assert outcome.num_kept == 2 and outcome.dropped == {"read": 1}


def test_any_address_of_fsspec_is_a_source(whole, heap, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(heap[0], "/heap/folder", recursive=True)
    for path in heap[1:]:
        memory.put(path, "/heap/")
    with fsspec.open("memory://heap/folder/metadata.csv", "wt") as file:
        file.write("file_name,text\nsilent.png,a silent picture\n")
    try:
        near = run_quietly([heap[0], *heap[1:]], tmp_path / "near", recipe=recipe(exact={"enabled": False}))
        outcome = run_quietly(
            ["memory://heap/folder", "memory://heap/part.tar", "memory://heap/rows.parquet"], tmp_path / "far",
            recipe=recipe(exact={"enabled": False}),
        )  # fmt: skip
        assert (outcome.num_pictures, outcome.num_kept) == (near.num_pictures, near.num_kept + 1)  # the silent one
        rows = [parquet.read_table(tmp_path / side / "index.parquet").to_pylist() for side in ("near", "far")]
        for one, other in zip(*rows, strict=True):
            assert one["sha256"] == other["sha256"] and one["file"] == other["file"]
            assert one["caption"] == other["caption"] or one["file"] == "silent.png"
        entries = list(list_source("memory://heap/folder", quiet))
        memory.rm("/heap", recursive=True)
        with pytest.raises(DataError, match="memory://heap/folder: the source has vanished"):
            read_bytes(entries[0])
        with pytest.raises(DataError, match="memory://heap: there is no such source"):
            list(list_source("memory://heap", quiet))
        with pytest.raises(DataError, match=r"nowhere://x: cannot be opened.*fsspec"):
            list(list_source("nowhere://x", quiet))
    finally:
        memory.store.clear()


def test_a_set_of_the_datasets_library_is_a_source(heap, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "mine"
    (folder / "train").mkdir(parents=True)
    for k in range(3):
        scene(k).save(folder / "train" / f"{k}.png")
    lines = [json.dumps({"file_name": f"{k}.png", "text": f"scene number {k}"}) + "\n" for k in range(3)]
    (folder / "train" / "metadata.jsonl").write_text("".join(lines))
    entries = list(list_source(f"datasets:{folder}", quiet))
    assert [entry.caption for entry in entries] == [f"scene number {k}" for k in range(3)]
    assert [read_bytes(entry) for entry in entries] == [packed(scene(k)) for k in range(3)]
    assert entries[1].name.endswith("row 0.1")
    assert run_quietly([f"datasets:{folder}:train"], tmp_path / "out").num_kept == 3
    with pytest.raises(DataError, match=r"datasets:.*none: cannot be loaded"):
        list(list_source(f"datasets:{tmp_path}/none", quiet))


def test_a_tar_that_is_cut_short_is_taken_as_far_as_it_goes(heap, tmp_path):
    with open(heap[1], "rb") as file:
        content = file.read()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) - 10240 - 2000])
    told = []
    entries = list(list_source(str(tmp_path / "cut.tar"), told.append))
    assert entries[0].member == "a.webp" and entries[0].caption == "red_sky, no_humans, sea"
    assert len(told) == 1 and "cut.tar" in told[0]


def redness(image):
    return float(image[..., 0].mean())


def shouted(image, caption):
    return f"A scene. Before: {caption or 'nothing'}"


def test_functions_of_the_user_replace_ours(heap, tmp_path):
    means = {k: redness(np.asarray(scene(k, 48 + k))) for k in range(6)}
    middle = sorted(means.values())[3]
    mine = recipe(
        blur={"function": "test_curation:redness", "at_least": middle}, near={"enabled": False},
        recaption={"enabled": True, "function": "test_curation:shouted"}, exact={"enabled": False},
    )  # fmt: skip
    outcome = run_quietly(heap[:1], tmp_path / "out", recipe=mine)
    rows = {row["file"]: row for row in parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()}
    assert {name: rows[f"{name}.png"]["dropped"] for name in means} == {
        name: None if mean >= middle else "blur" for name, mean in means.items()
    }
    if rows["silent.png"]["dropped"] is None:
        assert rows["silent.png"]["caption"] == "A scene. Before: nothing"
    assert outcome.num_kept == sum(row["dropped"] is None for row in rows.values())
    with pytest.raises(RecipeError, match="blur.function: 'nowhere:f' cannot be imported"):
        run_quietly(heap, tmp_path / "b", recipe=recipe(blur={"function": "nowhere:f"}))


def test_scores_of_a_network_drop_pictures_and_stand_beside_them(heap, tmp_path, monkeypatch):
    finish.networks.cache_clear()
    monkeypatch.setattr(finish, "load_scorer", lambda stage, *, name: redness)
    scored = recipe(aesthetic={"enabled": True, "model": "any", "at_least": 127.0})
    outcome = run_quietly(heap[:1], tmp_path / "out", recipe=scored)
    finish.networks.cache_clear()
    rows = parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    with_score = [row for row in rows if row["aesthetic"] is not None]
    assert len(with_score) == outcome.num_kept + outcome.dropped["aesthetic"] and outcome.dropped["aesthetic"]
    assert all((row["dropped"] is None) == (row["aesthetic"] >= 127.0) for row in with_score)


def test_only_pictures_without_a_caption_are_shown_to_the_captioning_server(heap, tmp_path, server):  # noqa: F811
    asked = recipe(recaption={"enabled": True, "model": "vlm", "endpoint": server}, captions={"languages": []})
    outcome = run_quietly(heap[:1], tmp_path / "out", recipe=asked)
    rows = {row["file"]: row for row in parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()}
    assert rows["silent.png"]["dropped"] is None and rows["silent.png"]["caption"] == "A red square."
    assert rows["0.png"]["caption"] == "scene number 0" and len(_Server.asked) == 1
    assert "captions" not in outcome.dropped
    strict = recipe(recaption={**asked.recaption.model_dump(), "when": "always"}, captions={"min_chars": 14})
    outcome = run_quietly(heap[:1], tmp_path / "always", recipe=strict)  # what is written is cleaned as well
    assert outcome.num_kept == 0 and outcome.dropped["recaption"] == len(_Server.asked) - 1 > 5


# Known answers


def test_every_stage_does_what_it_must_on_pictures_with_known_answers(tmp_path):
    benchmark = curation_benchmark()
    answers = benchmark.write_known(tmp_path, count=4, size=160)
    assert {"bomb", "EXIF-turned", "sepia", "mirrored and cropped"} < {answer.kind for answer in answers}
    lines = benchmark.judge(answers, tmp_path, CurationRecipe())
    assert {line.stage for line in lines} == {"decode", *benchmark.QUALITY, "exact", "near", "captions"}
    wrong = [(line.stage, line.kind, line.default_recall) for line in lines if line.default_recall < 0.74]
    assert not wrong
    assert np.mean([line.default_recall for line in lines]) > 0.97


def test_a_threshold_makes_the_fewest_mistakes():
    benchmark = curation_benchmark()
    assert benchmark.threshold_of(np.array([5.0, 7.0]), np.array([1.0, 3.0])) == 4.0
    # one good picture at 6: 4 costs it, 6.5 costs one of two bad ones
    assert benchmark.threshold_of(np.array([5.0, 7.0]), np.array([1.0, 3.0, 3.0, 6.0])) == 4.0
    assert benchmark.missed([benchmark.Line("near", "cropped", 9, 0.97, 1.0, 1.0)]) == [
        "near, cropped: precision 0.97, recall 1.000"
    ]


# The commands


def test_the_commands_tell_what_they_did(heap, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    (tmp_path / "curate.yaml").write_text("size: {at_least: 32}\nblur: {enabled: false}\n")
    run_curate(heap, tmp_path / "out", tmp_path / "curate.yaml", 1, console=console)
    assert "10 of 16 pictures kept; dropped: read 1, decode 1, size 1" in console.file.getvalue()
    run_inspect(tmp_path / "out", tmp_path / "sheet.png", size=64, crop="center", sample=100, console=console)
    told = console.file.getvalue()
    assert "10 captioned pictures; 10 of them looked at" in told
    assert Image.open(tmp_path / "sheet.png").width > 8 * 144
    with pytest.raises(DataError, match="among the pictures"):
        run_inspect(tmp_path / "out", tmp_path / "out" / "a.png", size=64, crop="center", sample=9, console=console)
    with pytest.raises(RecipeError, match="no crop 'left'"):
        run_inspect(tmp_path / "out", tmp_path / "a.png", size=64, crop="left", sample=9, console=console)


def test_an_inspection_shows_what_the_trainer_sees_of_each_bucket(tmp_path):
    """Eight pictures of 2:1 and two squares; the broken one goes into no bucket. The cut is the trainer's own."""
    for number in range(10):
        Image.effect_noise((128, 64) if number < 8 else (70, 70), 60).convert("RGB").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    (tmp_path / "x.png").write_bytes(b"broken")
    (tmp_path / "x.txt").write_text("broken")
    console = Console(file=io.StringIO(), width=200)

    def told(**how):
        console.file.seek(console.file.truncate(0))
        run_inspect(tmp_path, tmp_path.parent / "sheet.png", size=64, crop="center", sample=100, console=console, **how)
        return console.file.getvalue()

    lines = told(buckets="sdxl", batch_size=2)
    for words in ("in 2 buckets: ", "64 x 64: 2 pictures (20.0%)", "96 x 48: 8 pictures (80.0%)",
                  "in none, for they cannot be read: 1"):  # fmt: skip
        assert words in lines, lines
    assert "at 64 x 64: " in told()
    assert "in 1 buckets: " in told(buckets="computed", num_buckets=1)
    with pytest.raises(DataError, match="no bucket can fill a batch of 11"):
        told(buckets="sdxl", batch_size=11)
    with pytest.raises(RecipeError, match="buckets"):
        told(buckets="square")

    source = open_folder(tmp_path, log=quiet)
    buckets = assign(measured_sizes(source), sdxl_buckets(64, multiple=8), batch_size=2)
    seen = {one.index: one.image for one in inspect(source, size=64, buckets=buckets).seen}
    batch = next(batches(source, batch_size=2, size=buckets, first_slot=0, last_slot=2, seed=0))
    for image, caption in zip(batch.images, batch.captions, strict=True):
        shown = seen[int(caption.split()[1])]
        assert np.array_equal(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), shown)


def test_an_inspection_says_what_the_crop_takes_away(tmp_path):
    for name, size in (("a", (100, 50)), ("b", (40, 40))):
        colour = Image.new("RGB", size, "red")
        colour.paste("blue", (0, 0, 10, size[1]))
        colour.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red thing")
    (tmp_path / "c.png").write_bytes(b"broken")
    (tmp_path / "c.txt").write_text("broken")
    found = inspect(open_folder(tmp_path, log=quiet), size=50)
    assert [one.lost for one in found.seen] == [0.5, 0.0] and [one.scale for one in found.seen] == [1.0, 1.25]
    assert (found.seen[0].image == (255, 0, 0)).all()  # the blue edge is cropped away
    lines = "\n".join(described(found))
    for words in ("50% are enlarged", "25% of a picture on average, 50% at most", "another picture has too: 1",
                  "broken: 1, e.g. c.png", "red 2, thing 2"):  # fmt: skip
        assert words in lines
    sheet = np.asarray(contact_sheet(found, cell=50))
    assert (sheet[10:60, 10:60] == (255, 0, 0)).all() and not (sheet[10:60, 70:120] == (255, 0, 0)).all()
