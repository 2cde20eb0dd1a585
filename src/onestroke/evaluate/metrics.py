"""How far one set of pictures is from another, with intervals: pure functions on numpy arrays, in float64.

Set distances (`frechet_distance`, `kernel_distance`) take features and get their interval from `block_jackknife`;
scores with one number per prompt (`adherence`, `seed_spread`) get theirs from `paired_bootstrap`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from scipy.special import stdtrit

from onestroke.errors import DataError

Features = Float[np.ndarray, "n d"]
Pictures = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its confidence interval."""

    value: float
    low: float
    high: float


# Distances between two sets of features


@dataclass(frozen=True)
class Moments:
    """Number, mean and centred scatter (the sum of outer products, d x d) of features: what a stream leaves behind."""

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance."""
        return self.scatter / (self.count - 1)


def moments(features: Features) -> Moments:
    """The moments of one batch of features; `merge_moments` adds the next."""
    values = _checked(features)
    centred = values - values.mean(axis=0)
    return Moments(len(values), values.mean(axis=0), centred.T @ centred)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of both batches together, without cancellation (Chan, Golub and LeVeque 1983, eq. 1.5)."""
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter)


def frechet_distance(a: Features | Moments, b: Features | Moments) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two equally large sets (arXiv 1706.08500, eq. 6).

    `|mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2)`. It is biased upwards by about d^2 / 2n, see
    `frechet_bias`: only values at the same n compare. Raises DataError on unequal counts, different widths or
    features that are not finite.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    _check_alike(a.count, b.count, len(a.mean), len(b.mean))
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    # tr((A B)^1/2) is the sum of the singular values of A^1/2 B^1/2: no square root of a rounded-off eigenvalue.
    overlap = np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum()
    distance = np.square(a.mean - b.mean).sum() + np.square(root_a).sum() + np.square(root_b).sum() - 2 * overlap
    return max(0.0, float(distance))


def frechet_bias(covariance: Float[np.ndarray, "d d"], count: int) -> float:
    """What `frechet_distance` gives on average for two sets of `count` from one Gaussian: the floor of a comparison.

    To first order in 1/n, with eigenvalues l of the covariance: 2 sum_i l_i / n from the means, and
    (sum_i l_i + sum_{i != j} l_i l_j / (l_i + l_j)) / n from the covariances. With unit covariance d (d + 5) / 2n.
    Derived by us from the second-order expansion of the Bures distance with Wishart noise.
    """
    values = np.linalg.eigvalsh(covariance).clip(0)
    total = values[:, None] + values[None, :]
    pairs = np.divide(np.outer(values, values), total, out=np.zeros_like(total), where=total > 0)
    off_diagonal = pairs.sum() - np.trace(pairs)
    return float((3 * values.sum() + off_diagonal) / count)


def kernel_distance(a: Features, b: Features, *, rows_at_once: int = 1024) -> float:
    """Kernel distance (KID, arXiv 1801.01401, section 4): the unbiased squared MMD under `(x . y / d + 1)^3`.

    Over the full sets, not over random subsets as in the paper's code: the same expectation, less noise. Near 0, and
    sometimes below it, for equal distributions. Raises DataError like `frechet_distance`.
    """
    a, b = _checked(a), _checked(b)
    _check_alike(len(a), len(b), a.shape[1], b.shape[1])
    n = len(a)
    within = [_kernel_sum(x, x, rows_at_once) - _kernel_diagonal(x).sum() for x in (a, b)]
    return float(sum(within) / (n * (n - 1)) - 2 * _kernel_sum(a, b, rows_at_once) / n**2)


def _kernel_sum(a: Features, b: Features, rows: int) -> float:
    blocks = (a[first : first + rows] for first in range(0, len(a), rows))
    return sum(float(np.power(block @ b.T / a.shape[1] + 1, 3).sum()) for block in blocks)


def _kernel_diagonal(a: Features) -> Float[np.ndarray, " n"]:
    return (np.square(a).mean(axis=1) + 1) ** 3


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """R with R R^T = covariance, from eigenvalues: singular covariances (n <= d, dead features) are no exception."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(0))


def _checked(features: Features) -> Float[np.ndarray, "n d"]:
    values = np.asarray(features, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DataError(f"features shaped {values.shape} are not two pictures or more", fix="Give n x d, n at least 2.")
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise DataError(f"{bad} of {len(values)} pictures have features that are not finite")
    return values


def _check_alike(count_a: int, count_b: int, width_a: int, width_b: int) -> None:
    if count_a != count_b:
        raise DataError(
            f"{count_a} pictures against {count_b}",
            fix="Compare equally many: set distances depend on the number of pictures.",
        )
    if width_a != width_b:
        raise DataError(f"features of width {width_a} against {width_b}", fix="Use one feature network for both.")


# Intervals


def block_jackknife(
    statistic: Callable[..., float],
    *samples: np.ndarray,
    num_blocks: int = 20,
    coverage: float = 0.95,
    correct_bias: bool = False,
) -> Interval:
    """The interval of a statistic of whole sets, from leaving out one block of pictures at a time.

    `samples` are indexed alike along their first axis, and block k leaves all of them together; so pictures of one
    prompt belong side by side, and a ratio of two models on the same prompts keeps the benefit of its pairing.
    `value +- t * se` with `se^2 = (g-1)/g sum_k (T_k - mean T)^2` (Efron 1982, chapter 3, on blocks), t of Student's
    distribution with g-1 degrees of freedom. `correct_bias` centres it on `g T - (g-1) mean T`: free of a bias in
    1/n such as that of `frechet_distance`. Raises DataError on unequal counts or fewer pictures than blocks.
    """
    counts = [len(sample) for sample in samples]
    if len(set(counts)) > 1:
        raise DataError(f"samples of {' and '.join(map(str, counts))}", fix="Compare equally many.")
    if counts[0] < 2 * num_blocks:
        raise DataError(
            f"{counts[0]} samples are too few for {num_blocks} blocks", fix=f"Take {2 * num_blocks} at least."
        )
    value = float(statistic(*samples))
    blocks = np.array_split(np.arange(counts[0]), num_blocks)
    left_out = np.array([statistic(*(np.delete(sample, block, axis=0) for sample in samples)) for block in blocks])
    error = np.sqrt((num_blocks - 1) * left_out.var())
    if correct_bias:
        value = num_blocks * value - (num_blocks - 1) * float(left_out.mean())
    reach = float(stdtrit(num_blocks - 1, 0.5 + coverage / 2) * error)
    return Interval(value, value - reach, value + reach)


def paired_bootstrap(
    differences: Float[np.ndarray, " p"], *, num_resamples: int = 10_000, coverage: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of per-prompt scores, or of their differences between two models, with its percentile bootstrap interval.

    The prompts are resampled: `differences` has one number a prompt, so that both models share what is hard about it.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise DataError(f"scores shaped {values.shape} are not one number for each of two prompts or more")
    rng, count = np.random.default_rng(seed), len(values)
    rows = max(1, 2_000_000 // count)
    means = [
        values[rng.integers(count, size=(min(rows, num_resamples - first), count))].mean(axis=1)
        for first in range(0, num_resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.5 - coverage / 2, 0.5 + coverage / 2])
    return Interval(float(values.mean()), float(low), float(high))


# Prompt adherence


@dataclass(frozen=True)
class AttributeScore:
    """How often one named attribute was found. `corrected` is None where one value only was named: nothing to find."""

    named: int
    found: int
    chance: float
    corrected: float | None


@dataclass(frozen=True)
class AdherenceScore:
    """`value`: the mean over attributes of the chance-corrected share found; 0 is guessing, 1 all found.

    `found`: the plain share of all named attributes. `per_prompt`: one number a prompt whose mean is exactly `value`
    (each attribute weighs the same, so rare ones weigh more in the prompts that name them); the difference of two
    models' numbers on the same prompts goes to `paired_bootstrap`.
    """

    value: float
    found: float
    attributes: Mapping[str, AttributeScore]
    per_prompt: tuple[float, ...]


def chance_corrected_adherence(found: float, chance: float) -> float:
    """`(found - chance) / (1 - chance)`: 0 for a guesser, 1 for no error (Cohen's kappa). `chance` in [0, 1)."""
    return (found - chance) / (1 - chance)


def adherence(
    named: Sequence[Mapping[str, str]],
    judged: Sequence[Mapping[str, str]],
    *,
    reference: Sequence[Mapping[str, str]] | None = None,
) -> AdherenceScore:
    """How well pictures show what their prompts name, by a judge's word.

    `named[i]`: attribute -> value of prompt i; `judged[i]`: the judge's value of every attribute in picture i.
    Chance is that of guessing from the frequencies in `reference` (by default `named`): sum_v p_v^2. A collapsed model
    that always draws the commonest value can lie a little above 0. Pass one `reference` where several sets of prompts
    are compared. Raises DataError on unequal counts or an attribute that the judge does not know.
    """
    if len(named) != len(judged):
        raise DataError(
            f"{len(named)} prompts against {len(judged)} judged pictures", fix="Judge one picture a prompt."
        )
    if not any(named):
        raise DataError("no prompt names an attribute, so that there is no adherence to measure")
    hits = [_hits(wanted, seen, i) for i, (wanted, seen) in enumerate(zip(named, judged, strict=True))]
    chances = _chances(reference if reference is not None else named)
    scores = {name: _attribute_score(hits, name, chances.get(name, 0.0)) for name in sorted(set().union(*hits))}
    corrected = {name: score.corrected for name, score in scores.items() if score.corrected is not None}
    if not corrected:
        raise DataError("every named attribute has one value only", fix="Take prompts that name different values.")
    total = sum(score.named for score in scores.values())
    return AdherenceScore(
        value=sum(corrected.values()) / len(corrected),
        found=sum(score.found for score in scores.values()) / total,
        attributes=scores,
        per_prompt=tuple(_prompt_score(hit, scores, len(corrected), len(hits)) for hit in hits),
    )


def _hits(wanted: Mapping[str, str], seen: Mapping[str, str], index: int) -> dict[str, bool]:
    unknown = [name for name in wanted if name not in seen]
    if unknown:
        raise DataError(
            f"the judge says nothing about {unknown[0]!r}",
            where=f"picture {index}",
            fix="Judge with a network that knows every attribute of the prompts.",
        )
    return {name: seen[name] == value for name, value in wanted.items()}


def _chances(reference: Sequence[Mapping[str, str]]) -> dict[str, float]:
    values: dict[str, Counter[str]] = {}
    for prompt in reference:
        for name, value in prompt.items():
            values.setdefault(name, Counter())[value] += 1
    return {name: sum((n / counts.total()) ** 2 for n in counts.values()) for name, counts in values.items()}


def _attribute_score(hits: Sequence[Mapping[str, bool]], name: str, chance: float) -> AttributeScore:
    of_name = [hit[name] for hit in hits if name in hit]
    share = sum(of_name) / len(of_name)
    corrected = chance_corrected_adherence(share, chance) if chance < 1 else None
    return AttributeScore(len(of_name), sum(of_name), chance, corrected)


def _prompt_score(
    hit: Mapping[str, bool], scores: Mapping[str, AttributeScore], num_scored: int, num_prompts: int
) -> float:
    terms = (
        chance_corrected_adherence(float(found), scores[name].chance) / scores[name].named
        for name, found in hit.items()
        if scores[name].corrected is not None
    )
    return num_prompts * sum(terms) / num_scored


# Diversity and the look of pictures


def seed_spread(features_by_prompt: Float[np.ndarray, "p s d"]) -> Float[np.ndarray, " p"]:
    """For each of p prompts, the mean Euclidean distance between its s pictures (s at least 2); 0 where all agree.

    One number a prompt, to be averaged or paired with another model's.
    """
    return np.array([mean_pairwise_distance(pictures) for pictures in features_by_prompt])


def mean_pairwise_distance(features: Features) -> float:
    """The mean Euclidean distance between two different rows."""
    values = _checked(features)
    values = values - values.mean(axis=0)
    norms = np.square(values).sum(axis=1)
    squared = (norms[:, None] + norms[None, :] - 2 * values @ values.T).clip(0)
    np.fill_diagonal(squared, 0)
    return float(np.sqrt(squared).sum() / (len(values) * (len(values) - 1)))


def laplacian_sharpness(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Variance of the 4-neighbour Laplacian of the luma in [0, 1], inside the border: low is smeared, high is noisy."""
    luma = _luma(pictures)
    centre = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (around - 4 * centre).var(axis=(1, 2))


def saturation(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Mean chroma, the greatest minus the least of R, G and B, in [0, 1].

    Chroma, not HSV saturation (chroma over value): that is large and random in the near-black of ink lines.
    """
    rgb = np.asarray(pictures, dtype=np.float64) / 255
    return (rgb.max(axis=-1) - rgb.min(axis=-1)).mean(axis=(1, 2))


def contrast(pictures: Pictures) -> Float[np.ndarray, " n"]:
    """Standard deviation of the luma in [0, 1] (RMS contrast): at most 0.5."""
    return _luma(pictures).std(axis=(1, 2))


def _luma(pictures: Pictures) -> Float[np.ndarray, "n h w"]:
    return np.asarray(pictures, dtype=np.float64) @ np.array([0.299, 0.587, 0.114]) / 255  # Rec. 601
