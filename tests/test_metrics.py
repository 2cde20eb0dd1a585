"""Known answers of the metrics: worked by hand, from sampling theory, from torchmetrics or prdc."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from onestroke.errors import DataError
from onestroke.evaluate import distances, neighbours
from onestroke.evaluate.adherence import adherence, chance_corrected_adherence
from onestroke.evaluate.distances import (
    block_gaussians,
    cubic_kernel,
    frechet_bias,
    frechet_distance,
    frechet_replicates,
    gaussian_kernel,
    kernel_distance,
    kernel_replicates,
    mean_pairwise_distance,
    merge_moments,
    moments,
    seed_spread,
)
from onestroke.evaluate.intervals import (
    Interval,
    block_jackknife,
    blocks_of,
    by_prompt,
    mean_replicates,
    paired_bootstrap,
)
from onestroke.evaluate.latency import Contender, PartTimer, measure_latency, peak_memory
from onestroke.evaluate.neighbours import manifold, nearest_distance, neighbourhood
from onestroke.evaluate.quality import (
    GRIDS,
    PatchGrid,
    contrast,
    folded,
    grid_amplitude,
    laplacian_sharpness,
    saturation,
)


def frechet_blocks(a, b, blocks):
    return frechet_replicates(*(block_gaussians(x, blocks) for x in (a, b)))


def gaussian(seed: int, n: int, d: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_a_shift_its_squared_length():
    features = gaussian(0, 300, 16)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-10)
    shift = np.linspace(-1, 2, 16)
    assert frechet_distance(features, features + shift) == pytest.approx(np.square(shift).sum(), abs=1e-9)


def test_frechet_distance_of_a_set_to_its_scaled_self_is_the_trace_times_one_minus_s_squared():
    features = gaussian(1, 4000, 16) - gaussian(1, 4000, 16).mean(axis=0)
    trace = np.trace(np.cov(features.T))
    assert frechet_distance(features, 3 * features) == pytest.approx(trace * (1 - 3) ** 2, rel=1e-9)
    assert trace * 4 == pytest.approx(16 * 4, rel=0.03)  # d (1 - s)^2 of the distribution


def test_frechet_distance_holds_where_covariances_are_singular():
    features = gaussian(2, 40, 128)  # fewer pictures than features
    features[:, 100:] = 0.0  # dead features
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features + 0.5) == pytest.approx(128 * 0.25, rel=1e-9)
    line = np.zeros((3, 2))
    line[:, 0] = [-1, 0, 1]  # variance 1 along x; turned by 90 degrees there is no overlap: tr A + tr B
    assert frechet_distance(line, line[:, ::-1]) == pytest.approx(2)


def test_frechet_distance_of_commuting_covariances_matches_the_closed_form():
    count, scale_a, scale_b = 60, np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.5, 3.0])
    white, _ = np.linalg.qr(gaussian(3, count, 4) * [0, 1, 1, 1] + [1, 0, 0, 0])
    white = white[:, 1:] * np.sqrt(count - 1)  # mean 0, covariance 1 exactly
    assert frechet_distance(white * scale_a, white * scale_b) == pytest.approx(1.0**2 + 1.5**2)


@pytest.mark.parametrize(("n", "d"), [(400, 8), (1500, 24)])
def test_frechet_bias_of_equal_gaussians_is_d_times_d_plus_5_over_2n(n: int, d: int):
    runs = [frechet_distance(gaussian(10 + 2 * i, n, d), gaussian(11 + 2 * i, n, d)) for i in range(60)]
    assert frechet_bias(np.eye(d), n) == pytest.approx(d * (d + 5) / (2 * n))
    assert np.mean(runs) == pytest.approx(d * (d + 5) / (2 * n), rel=0.06)
    assert np.mean(runs) > 1.1 * d**2 / (2 * n)  # the rule of thumb alone is too low


def test_frechet_bias_of_unequal_variances_matches_sampling():
    scale = np.array([3.0, 1.0, 0.3, 0.0])
    runs = [
        frechet_distance(gaussian(500 + 2 * i, 500, 4) * scale, gaussian(501 + 2 * i, 500, 4) * scale)
        for i in range(300)
    ]
    assert np.mean(runs) == pytest.approx(frechet_bias(np.diag(scale**2), 500), rel=0.15)


def test_moments_of_a_stream_are_those_of_the_whole_even_far_from_zero():
    features = gaussian(4, 500, 6) + 1e6
    whole = moments(features)
    streamed = merge_moments(merge_moments(moments(features[:7]), moments(features[7:300])), moments(features[300:]))
    assert streamed.count == 500
    np.testing.assert_allclose(streamed.covariance, whole.covariance, atol=1e-8)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T), atol=1e-8)
    assert frechet_distance(streamed, whole) == pytest.approx(0, abs=1e-6)


class _FirstPixels(torch.nn.Module):
    """A feature network whose features the test knows: the first 12 bytes of the picture."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :12].double() / 50


def test_frechet_and_kernel_distances_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (400, 3, 4, 4), generator=generator, dtype=torch.uint8)
    fake = torch.randint(20, 200, (400, 3, 4, 4), generator=generator, dtype=torch.uint8)
    network = _FirstPixels()
    fid = FrechetInceptionDistance(feature=network, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=400)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    a, b = network(real).numpy(), network(fake).numpy()
    assert frechet_distance(a, b) == pytest.approx(fid.compute().item(), rel=1e-6)
    expected = kid.compute()[0].item()
    assert kernel_distance(a, b) == pytest.approx(expected, abs=1e-3)
    assert expected > 0.1


def test_distances_do_not_depend_on_the_rows_held_at_once(monkeypatch):
    a, b, blocks = gaussian(0, 90, 5), gaussian(1, 90, 5) + 0.3, blocks_of(np.arange(90))
    whole = kernel_replicates(a, b, blocks)
    there = neighbourhood(manifold(a, blocks), manifold(b, blocks))
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(neighbours, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(kernel_replicates(a, b, blocks).left_out, whole.left_out, rtol=1e-9)
    again = neighbourhood(manifold(a, blocks), manifold(b, blocks))
    assert again.recall.value == there.recall.value
    np.testing.assert_array_equal(again.density.left_out, there.density.left_out)


def test_kernel_distance_of_two_pictures_matches_hand_computation():
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [1.0]])
    # within a: (0*1+1)^3 = 1; within b: (2*1+1)^3 = 27; across: mean of 1, 1, 27, 8
    assert kernel_distance(a, b) == pytest.approx(1 + 27 - 2 * (1 + 1 + 27 + 8) / 4)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    runs = np.array([kernel_distance(gaussian(2 * i, 100, 4), gaussian(2 * i + 1, 100, 4)) for i in range(200)])
    assert abs(runs.mean()) < 3 * runs.std() / np.sqrt(len(runs))
    assert (runs < 0).any()


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distances_refuse_unequal_counts_widths_and_infinite_features(distance):
    with pytest.raises(DataError, match="30 pictures against 20"):
        distance(gaussian(0, 30, 4), gaussian(0, 20, 4))
    with pytest.raises(DataError, match="width 4 against 5"):
        distance(gaussian(0, 30, 4), gaussian(0, 30, 5))
    broken = gaussian(0, 30, 4)
    broken[3, 1] = np.inf
    with pytest.raises(DataError, match="1 of 30 pictures"):
        distance(broken, gaussian(0, 30, 4))


def _covered(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_block_jackknife_of_a_mean_is_the_classical_t_interval_of_block_means():
    sample = gaussian(5, 200, 1)[:, 0]
    interval = block_jackknife(np.mean, sample, blocks=blocks_of(np.arange(200), 20)).interval()
    error = sample.reshape(20, 10).mean(axis=1).std(ddof=1) / np.sqrt(20)
    assert interval.value == pytest.approx(sample.mean())
    assert interval.high - interval.value == pytest.approx(2.093024 * error)  # t of 19 degrees of freedom


def test_replicates_from_block_sums_are_those_of_computing_anew():
    a, b, blocks = gaussian(0, 120, 4), 1.3 * gaussian(1, 120, 4) + 0.2, blocks_of(np.arange(120) // 2)
    for fast, slow in (
        (frechet_blocks(a, b, blocks), block_jackknife(frechet_distance, a, b, blocks=blocks)),
        (kernel_replicates(a, b, blocks), block_jackknife(kernel_distance, a, b, blocks=blocks)),
        (mean_replicates(a[:, 0], blocks), block_jackknife(np.mean, a[:, 0], blocks=blocks)),
    ):
        assert fast.value == pytest.approx(slow.value)
        np.testing.assert_allclose(fast.left_out, slow.left_out, rtol=1e-9)
    there = neighbourhood(manifold(a, blocks), manifold(b, blocks))
    for block in range(10):
        keep = blocks != block
        part = compute_prdc(a[keep], b[keep], nearest_k=5)
        for key, expected in part.items():
            assert getattr(there, key).left_out[block] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("d", "scale", "shift", "truth"), [(3, 1.0, 1.0, 1.0), (16, 1.5, 0.0, 16 * 0.5**2)])
def test_set_distance_intervals_cover_what_is_known_of_gaussians(d, scale, shift, truth):
    blocks, corrected, kernels = blocks_of(np.arange(300)), [], []
    move = np.zeros(d)
    move[0] = shift
    for i in range(150):
        pair = gaussian(2 * i, 300, d), scale * gaussian(2 * i + 1, 300, d) + move
        corrected.append(frechet_blocks(*pair, blocks).interval(correct_bias=True))
        kernels.append(kernel_replicates(*pair, blocks).interval())
    assert 0.90 <= _covered(corrected, truth) <= 0.98  # the distance of the distributions themselves
    assert np.mean([interval.value for interval in corrected]) == pytest.approx(truth, rel=0.05)
    far = gaussian(900, 4000, d), scale * gaussian(901, 4000, d) + move
    assert 0.90 <= _covered(kernels, kernel_distance(*far)) <= 0.98


def test_uncorrected_frechet_intervals_cover_its_mean_at_that_number_of_pictures():
    blocks = blocks_of(np.arange(300))
    shift = np.array([1.0, 0.0, 0.0])
    pairs = [(gaussian(2 * i, 300, 3), gaussian(2 * i + 1, 300, 3) + shift) for i in range(150)]
    plain = [frechet_blocks(*pair, blocks).interval() for pair in pairs]
    assert 0.90 <= _covered(plain, float(np.mean([interval.value for interval in plain]))) <= 0.98


def test_intervals_of_equal_gaussians_are_not_too_narrow():
    blocks, runs = blocks_of(np.arange(200)), []
    for i in range(60):
        runs.append(kernel_replicates(gaussian(2 * i, 200, 4), gaussian(2 * i + 1, 200, 4), blocks).interval())
    assert _covered(runs, 0.0) >= 0.95


def test_block_jackknife_of_a_ratio_covers_and_gains_from_pairing():
    paired, shuffled, blocks = [], [], blocks_of(np.arange(200))
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shared, noise = rng.uniform(1, 9, 200), 0.1 * rng.standard_normal(200)
        above, below = mean_replicates(2 * shared + noise, blocks), mean_replicates(shared, blocks)
        paired.append((above / below).interval())
        shuffled.append((above / mean_replicates(np.roll(shared, 37), blocks)).interval())
    assert 0.90 <= _covered(paired, 2.0) <= 0.98
    assert np.mean([i.high - i.low for i in paired]) < 0.1 * np.mean([i.high - i.low for i in shuffled])


def test_intervals_refuse_unequal_and_too_few_samples():
    with pytest.raises(DataError, match="50 and 60"):
        block_jackknife(np.mean, gaussian(0, 50, 2), gaussian(1, 60, 2))
    with pytest.raises(DataError, match="15 samples are too few for 10 blocks. Take 20"):
        block_jackknife(np.mean, gaussian(0, 15, 1))
    with pytest.raises(DataError, match="too few"):
        blocks_of(np.arange(60) // 4)  # 15 prompts of 4 pictures


def test_pictures_of_one_prompt_share_a_block_and_count_as_one_for_the_bootstrap():
    groups = np.arange(60) // 3
    blocks = blocks_of(groups)
    assert all(len(set(blocks[groups == g])) == 1 for g in range(20)) and len(set(blocks)) == 10
    assert by_prompt(np.arange(6.0), np.array([0, 0, 1, 1, 3, 3])) == pytest.approx([0.5, 2.5, 4.5])
    repeated = np.repeat(gaussian(3, 50, 1)[:, 0], 4)
    once = paired_bootstrap(by_prompt(repeated, np.arange(200) // 4))
    assert once.high - once.low > 1.7 * (paired_bootstrap(repeated).high - paired_bootstrap(repeated).low)


def test_neighbour_measures_equal_prdc():
    a, b = gaussian(7, 150, 6), 0.8 * gaussian(8, 150, 6) + 0.4
    there = neighbourhood(*(manifold(x, blocks_of(np.arange(150)), nearest=4) for x in (a, b)))
    for key, expected in compute_prdc(a, b, nearest_k=4).items():
        assert getattr(there, key).value == pytest.approx(expected, abs=1e-3)
        assert 0 < expected < 1.5


def test_neighbour_measures_tell_lost_kinds_from_bad_pictures():
    blocks, real = blocks_of(np.arange(200)), gaussian(1, 200, 4)
    real[::2] += 20  # two kinds of picture
    one_kind = gaussian(2, 200, 4)
    there = neighbourhood(manifold(real, blocks), manifold(one_kind, blocks))
    assert there.precision.value > 0.9 and there.recall.value < 0.6 and there.coverage.value < 0.6
    bad = neighbourhood(manifold(real, blocks), manifold(gaussian(3, 200, 4) + 60, blocks))
    assert bad.precision.value == bad.coverage.value == 0


def test_neighbour_intervals_cover_their_mean():
    blocks, runs = blocks_of(np.arange(120)), []
    for i in range(100):
        runs.append(neighbourhood(*(manifold(gaussian(2 * i + k, 120, 3) + 0.7 * k, blocks) for k in (0, 1))))
    for key in ("precision", "density"):
        values = [getattr(run, key) for run in runs]
        assert _covered([v.interval() for v in values], float(np.mean([v.value for v in values]))) >= 0.90


def test_neighbour_measures_refuse_unequal_and_too_few():
    few = blocks_of(np.arange(20))
    with pytest.raises(DataError, match="20 pictures are too few for 18 neighbours"):
        manifold(gaussian(0, 20, 2), few, nearest=18)
    with pytest.raises(DataError, match="equally many"):
        neighbourhood(manifold(gaussian(0, 40, 2), blocks_of(np.arange(40))), manifold(gaussian(0, 20, 2), few))


def test_nearest_distance_is_that_of_the_nearest():
    reference = np.array([[0.0, 0.0], [10.0, 0.0]])
    assert nearest_distance(np.array([[3.0, 4.0], [10.0, 1.0]]), reference) == pytest.approx([5, 1])


def test_cmmd_of_hand_made_directions():
    a, b = np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 3.0], [0.0, 1.0]])  # two directions, a right angle
    # within each set 1000; across exp(-2 / 2 sigma^2) = exp(-0.01): 1000 (2 - 2 exp(-0.01))
    assert kernel_distance(a, b, kernel=gaussian_kernel) == pytest.approx(2000 * (1 - np.exp(-0.01)))
    assert cubic_kernel(a, b) == pytest.approx(np.ones((2, 2)))


def test_paired_bootstrap_matches_normal_theory_and_covers():
    sample = gaussian(6, 400, 1)[:, 0] + 0.3
    interval = paired_bootstrap(sample)
    assert interval.value == pytest.approx(sample.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * sample.std() / 20, rel=0.05)
    assert interval == paired_bootstrap(sample)  # seeded
    intervals = [paired_bootstrap(gaussian(i, 100, 1)[:, 0], num_resamples=500) for i in range(200)]
    assert 0.90 <= _covered(intervals, 0.0) <= 0.98


def test_adherence_matches_hand_computation():
    named = [{"hair": "bun", "style": "ink"}, {"hair": "bun"}, {"hair": "bob"}, {"hair": "bob", "style": "wash"}]
    judged = [
        {"hair": "bun", "style": "ink"},
        {"hair": "bob", "style": "ink"},
        {"hair": "bob", "style": "ink"},
        {"hair": "bob", "style": "ink"},
    ]
    score = adherence(named, judged)
    assert (score.attributes["hair"].named, score.attributes["hair"].found) == (4, 3)
    assert score.attributes["hair"].chance == score.attributes["style"].chance == 0.5
    assert score.attributes["hair"].corrected == pytest.approx((0.75 - 0.5) / 0.5)
    assert score.value == pytest.approx((0.5 + 0.0) / 2)  # each attribute weighs the same
    assert score.found == pytest.approx(4 / 6)
    # hair weighs 1/4 and style 1/2 of a half each; a hit counts +1, a miss -1 at chance 1/2
    assert score.per_prompt == pytest.approx([4 * (1 / 8 + 1 / 4), -4 / 8, 4 / 8, 4 * (1 / 8 - 1 / 4)])
    assert np.mean(score.per_prompt) == pytest.approx(score.value)


def test_adherence_of_guessing_is_zero_and_of_a_perfect_picture_one():
    rng = np.random.default_rng(0)
    draw = lambda: [{"hair": str(rng.choice(["a", "b", "c"], p=[0.6, 0.3, 0.1]))} for _ in range(4000)]  # noqa: E731
    named = draw()
    assert adherence(named, draw()).value == pytest.approx(0, abs=0.03)
    assert adherence(named, named).value == pytest.approx(1)
    assert chance_corrected_adherence(0.25, 0.25) == 0


def test_adherence_leaves_out_attributes_of_one_value_and_takes_chance_from_the_reference():
    named, judged = [{"hair": "bun"}, {"hair": "bun"}], [{"hair": "bun"}, {"hair": "bob"}]
    with pytest.raises(DataError, match="one value only"):
        adherence(named, judged)
    score = adherence(named, judged, reference=[{"hair": "bun"}, {"hair": "bob"}])
    assert score.value == pytest.approx(0)
    both = adherence(
        [{"hair": "bun", "hat": "cap"}, {"hair": "bob", "hat": "cap"}],
        [{"hair": "bun", "hat": "cap"}, {"hair": "bob", "hat": "cap"}],
    )
    assert both.attributes["hat"].corrected is None and both.value == pytest.approx(1)


def test_adherence_refuses_unequal_counts_and_attributes_unknown_to_the_judge():
    with pytest.raises(DataError, match="2 prompts against 1 judged"):
        adherence([{"hair": "a"}, {"hair": "b"}], [{"hair": "a"}])
    with pytest.raises(DataError, match="picture 1: the judge says nothing about 'hat'"):
        adherence([{"hair": "a"}, {"hat": "b"}], [{"hair": "a"}, {"hair": "b"}])


def test_spread_is_the_mean_distance_between_different_pictures():
    triangle = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # sides 3, 4, 5
    assert mean_pairwise_distance(triangle) == pytest.approx(4)
    assert seed_spread(np.stack([triangle, np.ones((3, 2))])) == pytest.approx([4, 0])
    assert mean_pairwise_distance(triangle + 1e6) == pytest.approx(4, abs=1e-6)


def test_looks_of_pictures_match_hand_computation():
    checks = np.zeros((2, 6, 6, 3), np.uint8)
    checks[0, ::2, ::2] = checks[0, 1::2, 1::2] = 255  # Laplacian +4 and -4, half of each
    checks[1] = [255, 0, 51]
    assert laplacian_sharpness(checks) == pytest.approx([16, 0])
    assert contrast(checks) == pytest.approx([0.5, 0])
    assert saturation(checks) == pytest.approx([0, 1])


def _with_lines(pictures: np.ndarray, stride: int, depth: int) -> np.ndarray:
    lined = pictures.astype(int)
    lined[:, ::stride] -= depth
    lined[:, :, ::stride] -= depth
    return lined.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.stride <= 16], ids=lambda g: g.name)
def test_a_grid_is_found_at_its_own_stride_and_content_is_not(grid):
    rng, blocks = np.random.default_rng(0), blocks_of(np.arange(60))
    smooth = np.kron(rng.integers(60, 200, (120, 16, 16, 1)), np.ones((1, 8, 8, 1), int)).astype(np.uint8)
    pictures = np.stack([np.roll(p, rng.integers(0, 64, 2), (0, 1)) for p in smooth.repeat(3, axis=3)])
    ours, theirs = pictures[:60], pictures[60:]
    if grid.is_resized:  # what the network sees is 126 px wide
        ours, theirs = ours[:, :126, :126], theirs[:, :126, :126]
    plain = grid_amplitude(folded(ours, grid), folded(theirs, grid), blocks)
    lined = grid_amplitude(folded(_with_lines(ours, grid.stride, 24), grid), folded(theirs, grid), blocks)
    assert plain.low == 0 and lined.low > 1 and lined.low > plain.high


def test_the_amplitude_of_a_grid_is_in_grey_levels():
    grid, blocks = PatchGrid(8), blocks_of(np.arange(20))
    waves = np.sin(2 * np.pi * np.arange(64) / 8)
    plain = np.full((20, 64, 64, 3), 128, np.uint8)
    waved = (128 + 40 * waves[None, :, None, None]).repeat(64, 2).repeat(3, 3).repeat(20, 0).round().astype(np.uint8)
    amplitude = grid_amplitude(folded(waved, grid), folded(plain, grid), blocks)
    assert amplitude.value == pytest.approx(40 / np.sqrt(2), rel=0.06)  # a sine; borders have no whole mean
    assert (folded(plain[:, :40, :40], grid) == 0).all()  # five patches to a side are too few


def test_memory_of_a_drawing_is_measured_at_its_highest_point():
    size = 200 * 2**20
    before = peak_memory(lambda: None, torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not tell")
    after = peak_memory(lambda: np.ones(size, np.uint8).sum(), torch.device("cpu"))
    assert 0.8 * size < after - before < 2 * size
    assert peak_memory(lambda: None, torch.device("cpu")) - before < 0.5 * size


def test_latency_takes_medians_splits_parts_and_compares_within_a_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("onestroke.evaluate.latency.time.perf_counter", lambda: clock[0])
    timer, drawn = PartTimer(), []

    def contender(label: str, steps: int) -> Contender:
        def spend(seconds: float) -> None:
            clock[0] += seconds * (1 + len(drawn) // 4)  # the machine slows down as the run goes on

        unet = timer.timed("unet", spend)

        def draw(batch_size: int) -> None:
            for _ in range(steps):
                unet(float(batch_size))
            with timer.part("vae"):
                spend(0.5)
            spend(0.25)
            drawn.append(label)

        return Contender(label, draw, steps)

    rows = measure_latency([contender("teacher", 8), contender("student", 1)], timer, batch_sizes=(1, 2), num_runs=3)
    assert [(row.label, row.batch_size) for row in rows] == [
        ("teacher", 1),
        ("student", 1),
        ("teacher", 2),
        ("student", 2),
    ]
    assert drawn[:8] == ["teacher", "student"] * 2 + ["student", "teacher"] + ["teacher", "student"]
    assert rows[0].speedup == 1
    assert rows[1].speedup == pytest.approx(8.75 / 1.75)
    assert rows[1].total == pytest.approx(sum(rows[1].parts.values()))
    assert rows[1].parts["unet"] / rows[1].parts["vae"] == pytest.approx(2)
    assert rows[1].parts["text"] == 0 and rows[1].num_runs == 3
    assert rows[1].fastest <= rows[1].total <= rows[1].slowest
    assert rows[2].per_hour == pytest.approx(3600 * 2 / rows[2].total)
    assert rows[1].least_speedup <= rows[1].speedup <= rows[1].most_speedup
