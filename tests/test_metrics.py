"""Known answers of the metrics: worked by hand, from sampling theory, or from torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from onestroke.errors import DataError
from onestroke.evaluate.latency import Contender, PartTimer, measure_latency
from onestroke.evaluate.metrics import (
    Interval,
    adherence,
    block_jackknife,
    chance_corrected_adherence,
    contrast,
    frechet_bias,
    frechet_distance,
    kernel_distance,
    laplacian_sharpness,
    mean_pairwise_distance,
    merge_moments,
    moments,
    paired_bootstrap,
    saturation,
    seed_spread,
)


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
    assert kernel_distance(a, b, rows_at_once=7) == pytest.approx(kernel_distance(a, b), rel=1e-10)
    assert expected > 0.1


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
    interval = block_jackknife(np.mean, sample, num_blocks=20)
    error = sample.reshape(20, 10).mean(axis=1).std(ddof=1) / np.sqrt(20)
    assert interval.value == pytest.approx(sample.mean())
    assert interval.high - interval.value == pytest.approx(2.093024 * error)  # t of 19 degrees of freedom


def test_block_jackknife_covers_the_frechet_distance_of_shifted_gaussians():
    shift = np.array([1.0, 0.0, 0.0])
    pairs = [(gaussian(2 * i, 300, 3), gaussian(2 * i + 1, 300, 3) + shift) for i in range(150)]
    plain = [block_jackknife(frechet_distance, *pair, num_blocks=15) for pair in pairs]
    corrected = [block_jackknife(frechet_distance, *pair, num_blocks=15, correct_bias=True) for pair in pairs]
    expected = float(np.mean([interval.value for interval in plain]))  # what n = 300 gives on average
    assert 0.90 <= _covered(plain, expected) <= 0.99
    assert 0.90 <= _covered(corrected, 1.0) <= 0.99  # the distance of the distributions themselves
    assert abs(np.mean([interval.value for interval in corrected]) - 1) < abs(expected - 1)


def test_block_jackknife_of_a_ratio_covers_and_gains_from_pairing():
    def ratio(a, b):
        return a.mean() / b.mean()

    paired, shuffled = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shared, noise = rng.uniform(1, 9, 200), 0.1 * rng.standard_normal(200)
        paired.append(block_jackknife(ratio, 2 * shared + noise, shared))
        shuffled.append(block_jackknife(ratio, 2 * shared + noise, np.roll(shared, 37)))
    assert 0.90 <= _covered(paired, 2.0) <= 0.99
    assert np.mean([i.high - i.low for i in paired]) < 0.1 * np.mean([i.high - i.low for i in shuffled])


def test_block_jackknife_refuses_unequal_and_too_few_samples():
    with pytest.raises(DataError, match="50 and 60"):
        block_jackknife(frechet_distance, gaussian(0, 50, 2), gaussian(1, 60, 2))
    with pytest.raises(DataError, match="30 samples are too few for 20 blocks"):
        block_jackknife(np.mean, gaussian(0, 30, 1))


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
