"""What the workers of a curation may use, and what the measures look at."""

from pathlib import Path

import pytest
from PIL import Image
from threadpoolctl import threadpool_info

from onestroke.data.curation.measures import Views
from onestroke.data.curation.processes import Processes


def tell_threads(out: Path) -> None:
    import numpy as np
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own

    np.ones((8, 8)) @ np.ones((8, 8))
    out.write_text(str(max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_computes_in_one_thread(num_workers, tmp_path):
    import scipy.linalg  # noqa: F401 - limits hold for what is loaded

    before = threadpool_info()
    paths = [tmp_path / str(number) for number in range(2)]
    assert len(list(Processes(num_workers)(tell_threads, [(path,) for path in paths]))) == 2
    assert [path.read_text() for path in paths] == ["1", "1"]
    assert [pool["num_threads"] for pool in threadpool_info()] == [pool["num_threads"] for pool in before]


@pytest.mark.parametrize(("size", "seen"), [
    ((512, 512), (256, 256)), ((1024, 256), (256, 64)), ((600, 300), (300, 150)), ((700, 700), (350, 350)),
    ((500, 250), (384, 192)), ((384, 100), (384, 100)), ((100, 60), (100, 60)),
])  # fmt: skip
def test_brightness_is_looked_at_on_256_to_384_pixels_by_whole_factors_where_one_fits(size, seen):
    light = Views(Image.new("RGB", size, (200, 100, 50)), size).light
    assert light.shape[::-1] == seen and int(light[0, 0]) == 124  # 0.299, 0.587, 0.114
