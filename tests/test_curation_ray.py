"""A curation on Ray Data: the same bytes as in one process, from any state that a stopped run left."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_curation import digests, heap, recipe, run_quietly, whole  # noqa: F401 - fixtures

from onestroke.data.curation.ray_engine import RayEngine, ray_engine
from onestroke.data.curation.recipe import load_curation
from onestroke.errors import DataError, RecipeError, ResourceError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onestroke[ray]'")


def test_a_cluster_that_is_not_there_is_named_in_one_line():
    with (
        pytest.raises(ResourceError, match="--ray 127.0.0.1:9: no Ray cluster.*running cluster"),
        ray_engine("127.0.0.1:9"),
    ):
        pass


@pytest.fixture(scope="module")
def engine():
    with ray_engine("local", num_workers=2) as engine:
        yield engine


class Counted:
    """An engine that notes how many calls it was given, and stops after some."""

    num_workers = 1

    def __init__(self, engine, stop_after=None):
        self.engine, self.left, self.calls = engine, stop_after, []

    def __call__(self, function, calls):
        self.calls.append(len(calls))
        for _ in self.engine(function, calls):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield


def test_ray_writes_the_bytes_that_one_process_writes(engine, whole, heap, tmp_path):  # noqa: F811
    assert isinstance(engine, RayEngine) and engine.num_workers == 2
    assert run_quietly(heap, tmp_path / "out", engine=engine) == whole[1]
    assert digests(tmp_path / "out") == digests(whole[0])


def test_a_run_on_ray_goes_on_with_the_shards_that_are_missing(engine, whole, heap, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_quietly(heap, out, engine=Counted(engine, stop_after=4 + 1 + 1))  # all is measured, one shard written
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    missing = 3 - len(list((out / ".curation").glob("finished-*.parquet")))
    again = Counted(engine)
    assert run_quietly(heap, out, engine=again) == whole[1]
    measured, written = again.calls  # nothing is measured again, and the search was over
    assert measured == 0 and written <= missing < 3  # what was under way when the first run stopped may have ended
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert before.items() <= after.items() and digests(out) == digests(whole[0])


def test_what_the_user_can_mend_comes_back_from_ray_as_it_was_raised(engine, heap, tmp_path):  # noqa: F811
    with pytest.raises(DataError, match="vanished while it was read.*goes on") as caught:
        next(engine(vanish, [(1,)]))
    assert caught.value.where == "here 1"
    scored = recipe(blur={"function": "test_curation:redness", "at_least": 1.0})
    assert run_quietly(heap[:1], tmp_path / "out", engine=engine, recipe=scored).num_kept  # found by the workers too


def vanish(number):
    raise DataError("the source has vanished while it was read", where=f"here {number}", fix="it goes on")


def test_a_killed_run_on_ray_is_finished_by_another_process(whole, heap, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    (tmp_path / "curate.yaml").write_text("size: {at_least: 32}\nblur: {enabled: false}\noutput: {shard_size: 4}\n")
    command = [sys.executable, "-m", "onestroke.cli", "curate", *heap, "--out", str(out), "--ray", "local",
               "--workers", "1", "--recipe", str(tmp_path / "curate.yaml")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(out.glob(".curation/measured-*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "curation.html").exists()
    same = load_curation(tmp_path / "curate.yaml")
    assert run_quietly(heap, out, recipe=same) == whole[1] and digests(out) == digests(whole[0])


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(RecipeError, match=r"not installed.*onestroke\[ray\]"), ray_engine("local"):
        pass
