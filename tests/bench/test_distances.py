import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from strategies import normal, random_inputs, random_masses, random_network, seeded, seeds

import meanfield as mf
from meanfield import starts
from meanfield.bench import distances
from meanfield.bench.distances import (
    FeatureMeasure,
    debiased_cka,
    linear_cka,
    median_distance,
    mmd,
    moments,
    null_band,
    sliced_wasserstein,
    split_half,
    wasserstein,
)
from meanfield.finite import FiniteCNN

SIGMAS = 4.5  # two-sided level 7e-6 of every Monte Carlo test below
sizes, dimensions = st.integers(1, 7), st.integers(1, 5)


def cloud(size, dimension, seed, scale=1.0):
    """Random points of random masses."""
    return FeatureMeasure(scale * normal((size, dimension), seed), random_masses(size, seed + 1))


def gaussian(size, dimension, seed):
    return FeatureMeasure.uniform(normal((size, dimension), seed))


def shifted(measure, shift):
    return FeatureMeasure(measure.values + shift, measure.masses)


def cloned(measure, share=0.3):
    """The same measure, its first particle split in two and its particles in another order."""
    masses = torch.cat(
        [
            measure.masses * torch.cat([measure.masses.new_tensor([share]), measure.masses.new_ones(measure.size - 1)]),
            (1 - share) * measure.masses[:1],
        ]
    )
    return FeatureMeasure(torch.cat([measure.values, measure.values[:1]]).flip(0), masses.flip(0))


def sliced(a, b, seed=0, projections=50):
    return sliced_wasserstein(a, b, generator=seeded(seed), projections=projections).value


DISTANCES = {
    "W1": lambda a, b: wasserstein(a, b, p=1),
    "W2": wasserstein,
    "sliced": sliced,
    "mmd": lambda a, b: mmd(a, b, [0.7]).values[0],
    "mmd with median": lambda a, b: mmd(a, b).values[1],
    "1 - cka": lambda a, b: 1 - linear_cka(a, b),
}


# feature measures


def test_features_of_a_layer_are_rows_over_inputs_then_positions():
    arch = mf.Architecture((1, 4, 3), (mf.Conv(2, bias=True), mf.Conv(2, padding=1, pooling="average")))
    network, inputs = random_network(arch, (3, 5), seed=0), random_inputs(arch, 4, seed=0)
    for preactivations, maps in ((False, network.features(inputs)), (True, network.responses(inputs).preactivations)):
        for layer in range(2):
            measure = FeatureMeasure.of(network, inputs, layer, preactivations=preactivations)
            expected = [[float(v) for n in range(4) for v in maps[layer][n, i].flatten()] for i in range(measure.size)]
            np.testing.assert_array_equal(measure.values, expected)
            assert torch.equal(measure.masses, network.masses[layer])


def test_a_finite_network_is_taken_in_its_own_scaling():
    """He-scaled features do not depend on the scaling's name, and the mean-field kernels carry no graph along."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2), mf.Conv(2)))
    inputs = random_inputs(arch, 3, seed=1)
    finite = FiniteCNN.random(arch, (4, 6), inputs, seeded(0), "standard")
    hidden = torch.relu(torch.nn.functional.conv2d(inputs, finite.kernels[0]))
    expected = torch.relu(torch.nn.functional.conv2d(hidden, finite.kernels[1])).squeeze((2, 3)).T
    measure = FeatureMeasure.of(finite, inputs, 1)
    torch.testing.assert_close(measure.values, expected.detach())
    torch.testing.assert_close(measure.masses, torch.full((6,), 1 / 6, dtype=torch.float64))


@given(seeds)
def test_standardised_features_have_mean_zero_and_mean_square_one(seed):
    values = 3 * normal((4, 9), seed) + 100
    standard = FeatureMeasure.uniform(values).standardised().values
    np.testing.assert_allclose(standard, scipy.stats.zscore(values.numpy(), axis=1), rtol=1e-9, atol=1e-9)
    correlation = np.corrcoef(values.numpy())
    squared = (standard[:, None] - standard).square().mean(2)
    np.testing.assert_allclose(squared, 2 * (1 - correlation), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_standardise_to_zero_and_small_variation_is_kept(dtype):
    values = torch.full((3, 7), 0.1, dtype=dtype)
    values[1] *= 1 + torch.finfo(dtype).eps * torch.arange(7, dtype=dtype)
    values[2] *= 1 + 1e4 * torch.finfo(dtype).eps * torch.arange(7, dtype=dtype)
    standard = FeatureMeasure.uniform(values).standardised().values
    assert standard.dtype == dtype
    assert torch.equal(standard[:2], torch.zeros_like(standard[:2]))
    torch.testing.assert_close(standard[2].square().mean(), torch.ones((), dtype=dtype))


# optimal transport


@given(seeds, st.integers(1, 20), st.sampled_from([1, 1.5, 2, 3]))
def test_wasserstein_on_the_line_sorts(seed, size, p):
    a, b = gaussian(size, 1, seed), gaussian(size, 1, seed + 1)
    gaps = np.sort(a.values.numpy(), axis=0) - np.sort(b.values.numpy(), axis=0)
    np.testing.assert_allclose(wasserstein(a, b, p), np.mean(np.abs(gaps) ** p) ** (1 / p), rtol=1e-9)


@given(seeds, sizes, sizes, dimensions, st.sampled_from([1, 2]))
def test_wasserstein_is_the_linear_program_of_its_definition(seed, m, n, dimension, p):
    a, b = cloud(m, dimension, seed), cloud(n, dimension, seed + 2)
    cost = [(float((x - y).norm()) / math.sqrt(dimension)) ** p for x in a.values for y in b.values]
    rows = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    optimum = scipy.optimize.linprog(cost, A_eq=rows, b_eq=torch.cat([a.masses, b.masses]).numpy())
    np.testing.assert_allclose(wasserstein(a, b, p), optimum.fun ** (1 / p), rtol=1e-6)


def test_wasserstein_of_equal_masses_is_an_assignment():
    a, b = gaussian(60, 4, 0), gaussian(60, 4, 1)
    cost = (a.values[:, None] - b.values).square().mean(2).numpy()
    np.testing.assert_allclose(wasserstein(a, b) ** 2, cost[linear_sum_assignment(cost)].mean(), rtol=1e-12)


@given(seeds, sizes, dimensions, st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 1e6]))
def test_wasserstein_to_a_shift_is_the_shift_whatever_the_offset(seed, size, dimension, p, offset):
    here, shift = shifted(cloud(size, dimension, seed), offset), normal((dimension,), seed + 2)
    np.testing.assert_allclose(
        wasserstein(here, shifted(here, shift), p), float(shift.square().mean().sqrt()), rtol=1e-7
    )


def test_wasserstein_between_affine_images_is_the_gaussian_formula():
    """Gelbrich 1990: W_2^2 >= |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^1/2 S_2 S_1^1/2)^1/2), equal for y = A x + c, A
    positive.

    With the moments of the sample this holds without Monte Carlo error, for Gaussians and any other law.
    """
    x, root = normal((300, 3), 0), normal((3, 3), 1)
    y = x @ (root @ root.T) + torch.tensor([1.0, -2.0, 0.5])
    first, second = (np.cov(points.numpy().T, bias=True) for points in (x, y))
    half = scipy.linalg.sqrtm(first)
    bures = np.trace(first + second - 2 * scipy.linalg.sqrtm(half @ second @ half)).real
    expected = (float((x.mean(0) - y.mean(0)).square().sum()) + bures) / 3
    np.testing.assert_allclose(
        wasserstein(FeatureMeasure.uniform(x), FeatureMeasure.uniform(y)) ** 2, expected, rtol=1e-10
    )


def test_gaussians_on_the_line_agree_with_their_closed_form():
    """W_2(N(m, s^2), N(m', s'^2))^2 = (m - m')^2 + (s - s')^2.

    By the triangle inequality samples x, x' miss it by at most the distances to their own laws, s W_2(standardised
    sample, N(0, 1)) each, which quantiles give exactly: a bound without a constant to tune.
    """
    grid = (np.arange(200_000) + 0.5) / 200_000
    quantiles = scipy.stats.norm.ppf(grid)

    def own(points):
        return math.sqrt(np.mean((np.sort(points)[(grid * len(points)).astype(int)] - quantiles) ** 2)) + 1e-3

    x, y = normal((1500,), 0), normal((1500,), 1)
    measured = wasserstein(FeatureMeasure.uniform(1 + 0.5 * x[:, None]), FeatureMeasure.uniform(3 + 2 * y[:, None]))
    assert abs(measured - math.sqrt(2**2 + 1.5**2)) <= 0.5 * own(x.numpy()) + 2 * own(y.numpy()) < 0.3


@pytest.mark.parametrize("name", DISTANCES)
@given(seed=seeds, m=sizes, n=sizes, dimension=st.integers(2, 5))
def test_order_and_splitting_of_particles_change_nothing_and_distances_are_symmetric(name, seed, m, n, dimension):
    distance, a, b = DISTANCES[name], cloud(m, dimension, seed), cloud(n, dimension, seed + 2)
    expected = distance(a, b)
    np.testing.assert_allclose(distance(cloned(a), cloned(b, 0.6)), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(distance(b, a), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(distance(a, cloned(a)), 0, atol=1e-7)


@given(seeds, sizes, sizes, sizes, dimensions, st.sampled_from([1, 2, 4]))
def test_wasserstein_obeys_the_triangle_inequality(seed, m, n, k, dimension, p):
    a, b, c = cloud(m, dimension, seed), cloud(n, dimension, seed + 2), cloud(k, dimension, seed + 4)
    assert wasserstein(a, c, p) <= wasserstein(a, b, p) + wasserstein(b, c, p) + 1e-9


def test_clones_are_at_distance_zero_in_spite_of_rounding():
    """The difference of squares leaves 1e-8 of a norm, which the median of positive distances
    would take at its word.
    """
    a = cloud(40, 300, 0)
    assert wasserstein(a, cloned(a)) == 0
    lumps = FeatureMeasure.uniform(normal((2, 300), 1).repeat_interleave(30, 0))
    np.testing.assert_allclose(
        median_distance(lumps, lumps), float((lumps.values[0] - lumps.values[-1]).square().mean().sqrt()), rtol=1e-12
    )


def test_distances_do_not_grow_with_the_number_of_probes():
    a, b = cloud(6, 4, 0), cloud(5, 4, 2)
    twice = [FeatureMeasure(measure.values.repeat(1, 2), measure.masses) for measure in (a, b)]
    np.testing.assert_allclose(wasserstein(*twice), wasserstein(a, b), rtol=1e-12)
    np.testing.assert_allclose(mmd(*twice).squared, mmd(a, b).squared, rtol=1e-9)
    wide = [sliced_wasserstein(*pair, generator=seeded(0), projections=4000) for pair in (twice, (a, b))]
    assert abs(wide[0].squared - wide[1].squared) <= SIGMAS * math.hypot(wide[0].squared_error, wide[1].squared_error)


@given(seeds, sizes, st.sampled_from([1, 2, 5, 50, 200]), st.sampled_from([1e-8, 1e-7, 3e-3, 1.0, 1e9]))
def test_wasserstein_to_a_shift_is_the_shift_at_any_size_and_power(seed, size, p, length):
    here = cloud(size, 3, seed)
    for scale in (length, 1.0):  # of the cloud, as small as its shift or not
        first = FeatureMeasure(scale * here.values, here.masses)
        np.testing.assert_allclose(wasserstein(first, shifted(first, length), p), length, rtol=1e-7)


@given(seeds, st.integers(1, 7), st.sampled_from([1, 2, 8, 40]), st.sampled_from([1e-150, 1e-8, 1.0, 1e200]))
def test_wasserstein_on_the_line_sorts_at_any_size_and_power(seed, size, p, scale):
    a, b = gaussian(size, 1, seed), gaussian(size, 1, seed + 1)
    gaps = np.abs(np.sort(a.values.numpy(), axis=0) - np.sort(b.values.numpy(), axis=0))
    expected = scale * gaps.max() * np.mean((gaps / gaps.max()) ** p) ** (1 / p)
    scaled = [FeatureMeasure(scale * each.values, each.masses) for each in (a, b)]
    np.testing.assert_allclose(wasserstein(*scaled, p), expected, rtol=1e-9)


SCALED = {
    "W1": lambda a, b: [wasserstein(a, b, p=1)],
    "W2": lambda a, b: [wasserstein(a, b)],
    "W7": lambda a, b: [wasserstein(a, b, p=7)],
    "sliced": lambda a, b: [sliced(a, b)],
    "median": lambda a, b: [median_distance(a, b)],
    "bandwidths": lambda a, b: mmd(a, b).bandwidths,
    "moments": lambda a, b: [moments(a).variance ** 0.5],
    "split half": lambda a, b: split_half(a, wasserstein, seeded(0), 5).distances,
    "pairs": lambda a, b: null_band([a, b, a], wasserstein).distances,
}
UNCHANGED = {
    "mmd": lambda a, b: mmd(a, b).squared,
    "cka": lambda a, b: [linear_cka(a, b)],
    "debiased cka": lambda a, b: [debiased_cka(a, b)],
    "kurtosis": lambda a, b: [moments(a).kurtosis],
}


@pytest.mark.parametrize("name", [*SCALED, *UNCHANGED])
@given(seed=seeds, m=st.integers(2, 6), n=st.integers(2, 6), power=st.integers(-12, 12))
def test_a_common_factor_counts_once_and_an_added_constant_not_at_all(name, seed, m, n, power):
    pair, factor = (cloud(m, 5, seed), cloud(n, 5, seed + 2)), 10.0**power
    figure, times = (SCALED[name], factor) if name in SCALED else (UNCHANGED[name], 1.0)
    expected = np.array(figure(*pair))
    scaled = figure(*(FeatureMeasure(factor * each.values, each.masses) for each in pair))
    np.testing.assert_allclose(scaled, times * expected, rtol=1e-7, atol=1e-12 * times)
    np.testing.assert_allclose(figure(*(shifted(each, 1e5) for each in pair)), expected, rtol=1e-6, atol=1e-9)


def with_outlier(measure, far):
    values = torch.cat([measure.values, torch.full((1, measure.dimension), far, dtype=torch.float64)])
    return FeatureMeasure(values, torch.cat([0.9 * measure.masses, measure.masses.new_tensor([0.1])]))


@given(seeds, sizes, sizes, st.sampled_from([1e3, 1e9, 1e12]), st.sampled_from([1, 2, 5]))
def test_an_outlier_of_both_measures_hides_nothing(seed, m, n, far, p):
    """It stays where it is: W_p^p is 0.9 of the others', MMD^2 0.81 of theirs, the median that of pairs of others."""
    a, b = cloud(m, 3, seed), cloud(n, 3, seed + 2)
    pair = with_outlier(a, far), with_outlier(b, far)
    np.testing.assert_allclose(wasserstein(*pair, p), 0.9 ** (1 / p) * wasserstein(a, b, p), rtol=1e-6)
    np.testing.assert_allclose(mmd(*pair, [0.7]).squared, 0.81 * np.array(mmd(a, b, [0.7]).squared), rtol=1e-6)
    one_side = mmd(with_outlier(a, far), b, [0.7]).squared[0]
    assert 0 <= one_side <= 2


def test_mmd_of_huge_values_is_that_of_their_pattern():
    a, b = cloud(5, 3, 0), cloud(6, 3, 2)
    huge = [FeatureMeasure(1e200 * each.values, each.masses) for each in (a, b)]
    np.testing.assert_allclose(mmd(*huge).squared, mmd(a, b).squared, rtol=1e-9)
    apart = float(a.masses @ a.masses + b.masses @ b.masses)  # at bandwidth 1 no two features see each other
    np.testing.assert_allclose(mmd(*huge, [1.0]).squared, apart, rtol=1e-12)


# sliced transport


@given(seeds, sizes, sizes)
def test_on_the_line_sliced_is_exact_transport(seed, m, n):
    a, b = cloud(m, 1, seed), cloud(n, 1, seed + 2)
    result = sliced_wasserstein(a, b, generator=seeded(seed), projections=3)
    np.testing.assert_allclose(result.value, wasserstein(a, b), rtol=1e-7)
    assert result.error <= 1e-9


@given(seeds, sizes, sizes, st.integers(2, 5))
def test_sliced_is_the_mean_over_its_directions_of_transport_on_lines(seed, m, n, dimension):
    a, b = cloud(m, dimension, seed), cloud(n, dimension, seed + 2)
    thetas = distances._directions(dimension, 4, seeded(seed), a.values)
    np.testing.assert_allclose(thetas.norm(dim=1), 1, rtol=1e-12)
    lines = [[FeatureMeasure((each.values @ theta)[:, None], each.masses) for each in (a, b)] for theta in thetas]
    squares = np.array([wasserstein(*line) ** 2 for line in lines])
    result = sliced_wasserstein(a, b, generator=seeded(seed), projections=4)
    np.testing.assert_allclose(
        [result.squared, result.squared_error], [squares.mean(), squares.std(ddof=1) / 2], rtol=1e-7
    )


def test_sliced_keeps_the_convention_of_pot():
    import ot

    a, b = cloud(7, 3, 0), cloud(9, 3, 2)
    thetas = distances._directions(3, 40, seeded(5), a.values)
    theirs = ot.sliced_wasserstein_distance(
        *(each.numpy() for each in (a.values, b.values, a.masses, b.masses)), projections=thetas.T.numpy()
    )
    np.testing.assert_allclose(sliced(a, b, 5, 40), theirs, rtol=1e-9)


@pytest.mark.parametrize("dimension", [2, 12])
def test_sliced_distance_to_a_shift_has_the_moments_of_the_beta_law(dimension):
    """<theta, v>^2 / |v|^2 is Beta(1/2, (D-1)/2): mean 1/D, variance 2 (D-1) / (D^2 (D+2)); R directions divide it by
    R.
    """
    here, shift, count = cloud(5, dimension, 0), normal((dimension,), 9), 5000
    result = sliced_wasserstein(here, shifted(here, shift), generator=seeded(1), projections=count)
    size = float(shift.square().mean())
    error = size * math.sqrt(2 * (dimension - 1) / (dimension + 2) / count)
    assert abs(result.squared - size) <= SIGMAS * error
    # relative deviation of a sample variance: sqrt((kurtosis - 1) / R) at most, and half of it for its root
    kurtosis = 3 + scipy.stats.beta(0.5, (dimension - 1) / 2).stats("k")
    assert abs(result.squared_error / error - 1) <= SIGMAS * math.sqrt((kurtosis - 1) / count) / 2 * 1.2
    np.testing.assert_allclose(
        [result.value, result.error], [math.sqrt(result.squared), result.squared_error / (2 * result.value)]
    )


def test_the_standard_error_of_sliced_transport_covers():
    """Against an exact value: from a point at 0 the mean over directions is E |y|^2 / D."""
    point, b = FeatureMeasure.uniform(torch.zeros(1, 4, dtype=torch.float64)), cloud(6, 4, 3)
    exact = float(b.masses @ b.values.square().mean(1))
    results = [sliced_wasserstein(point, b, generator=seeded(seed), projections=200) for seed in range(400)]
    covered = np.mean([abs(each.squared - exact) <= 1.96 * each.squared_error for each in results])
    assert abs(covered - 0.95) <= SIGMAS * math.sqrt(0.95 * 0.05 / 400)


@given(seeds, sizes, sizes, st.integers(2, 5))
def test_sliced_is_below_exact_transport(seed, m, n, dimension):
    a, b = cloud(m, dimension, seed), cloud(n, dimension, seed + 2)
    result = sliced_wasserstein(a, b, generator=seeded(seed), projections=2000)
    assert result.squared <= wasserstein(a, b) ** 2 + SIGMAS * result.squared_error


def test_sliced_is_a_function_of_its_seed_and_zero_on_equal_measures():
    a, b = cloud(5, 3, 0), cloud(4, 3, 2)
    assert sliced(a, b, 3) == sliced(a, b, 3) != sliced(a, b, 4)
    assert sliced_wasserstein(a, a, generator=seeded(0)).error == sliced(a, a) == 0


# maximum mean discrepancy


def slow_mmd(a, b, bandwidth, unbiased=False):
    """Double loops over particles."""

    def mean(first, second, skip=False):
        total = mass = 0.0
        for i, (x, p) in enumerate(zip(first.values, first.masses)):
            for j, (y, q) in enumerate(zip(second.values, second.masses)):
                if not (skip and i == j):
                    total += float(p * q) * math.exp(-float((x - y).square().sum()) / (2 * bandwidth**2 * len(x)))
                    mass += float(p * q)
        return total / mass

    return mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b)


@given(seeds, st.integers(2, 6), st.integers(2, 6), dimensions, st.booleans())
def test_mmd_is_the_double_loop(seed, m, n, dimension, unbiased):
    a, b = cloud(m, dimension, seed), cloud(n, dimension, seed + 2)
    result = mmd(a, b, [0.4, 1.5], unbiased=unbiased)
    assert result.bandwidths == (0.4, 1.5)
    np.testing.assert_allclose(result.squared, [slow_mmd(a, b, s, unbiased) for s in (0.4, 1.5)], rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(result.values, np.sqrt(np.maximum(result.squared, 0)))


def gaussian_mmd(shift, sigma, bandwidth, dimension):
    """N(0, I) against N(shift, sigma^2 I): E k = (c / (c + v))^(D/2) exp(-|m|^2 / (2 (c + v))), x - x' ~ N(m, v I), c
    = s^2 D.
    """

    def kernel(variance, mean):
        c = bandwidth**2 * dimension
        return (c / (c + variance)) ** (dimension / 2) * math.exp(-(mean**2) * dimension / (2 * (c + variance)))

    return kernel(2, 0) + kernel(2 * sigma**2, 0) - 2 * kernel(1 + sigma**2, shift)


@pytest.mark.parametrize(("shift", "sigma"), [(0.0, 1.0), (0.6, 1.0), (0.3, 1.8)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_unbiased_estimate_averages_to_the_closed_form_for_gaussians(shift, sigma, weighted):
    """0 for equal laws; masses that do not depend on the particles keep it unbiased."""
    bandwidth, dimension, estimates = 0.8, 3, []
    masses = [random_masses(m, 5) if weighted else torch.full((m,), 1 / m, dtype=torch.float64) for m in (12, 17)]
    for draw in range(400):
        x, y = normal((12, dimension), 2 * draw), shift + sigma * normal((17, dimension), 2 * draw + 1)
        estimates.append(
            mmd(FeatureMeasure(x, masses[0]), FeatureMeasure(y, masses[1]), [bandwidth], unbiased=True).squared[0]
        )
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - gaussian_mmd(shift, sigma, bandwidth, dimension)) <= SIGMAS * error
    assert error < 0.006  # closed forms 0, 0.070, 0.096: the interval would notice


def test_the_biased_estimate_exceeds_by_its_known_bias():
    """E V = MMD^2 + sum over both measures of (1 - E k(x, x')) sum_i p_i^2."""
    masses, bandwidth, dimension = random_masses(8, 0), 0.8, 3
    draws = [
        [FeatureMeasure(normal((8, dimension), 2 * draw + side), masses) for side in range(2)] for draw in range(400)
    ]
    estimates = [mmd(*pair, [bandwidth]).squared[0] for pair in draws]
    c = bandwidth**2 * dimension
    expected = 2 * (1 - (c / (c + 2)) ** (dimension / 2)) * float(masses @ masses)
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - expected) <= SIGMAS * error < expected / 10


@given(seeds, sizes, dimensions)
def test_mmd_of_equal_measures_is_zero(seed, size, dimension):
    a = cloud(size, dimension, seed, scale=50.0)
    np.testing.assert_allclose(mmd(a, a).squared, 0, atol=1e-15)


def test_default_bandwidths_are_multiples_of_the_median_distance():
    a = FeatureMeasure.uniform(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    b = FeatureMeasure(torch.tensor([[0.0, 0.0], [7.0, 7.0]]), torch.tensor([0.9, 0.1]))
    # pooled: 0 with mass 37/60, 1 with 20/60, 7 with 3/60; distances 1, 6, 7 with masses 740, 60, 111
    assert median_distance(a, b) == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(mmd(a, b).bandwidths, [0.5, 1, 2], rtol=1e-12)
    four = FeatureMeasure.uniform(torch.tensor([[0.0], [1.0], [3.0], [7.0]]))
    assert median_distance(four, four) == pytest.approx(3, rel=1e-12)  # the lower median of 1, 2, 3, 4, 6, 7
    two, ten = (FeatureMeasure.uniform(torch.tensor([[0.0], [far]])) for far in (3.0, 10.0))
    assert median_distance(two, ten) == pytest.approx(7, rel=1e-12)  # 3, 7, 10 with masses 2, 1, 2


def test_measures_on_one_point_have_mmd_zero():
    dead = FeatureMeasure.uniform(torch.zeros(3, 4))
    assert median_distance(dead, dead) == 1
    assert mmd(dead, dead).values == (0, 0, 0)


# moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds)
def test_moments_weigh_as_repetitions_do(dtype, seed):
    counts = torch.randint(1, 5, (6,), generator=seeded(seed))
    values = (normal((6, 7), seed).exp() + 3).to(dtype)
    result = moments(FeatureMeasure(values, counts.to(dtype) / counts.sum()))
    sample = np.repeat(values.double().numpy(), counts.numpy(), axis=0).ravel()
    expected = [sample.mean(), sample.var(), scipy.stats.kurtosis(sample)]
    np.testing.assert_allclose(
        result, expected, rtol=1e-9 if dtype == torch.float64 else 1e-4, atol=1e-9 if dtype == torch.float64 else 1e-5
    )


QUADRATURES = {
    "normal": (scipy.stats.norm(), *np.polynomial.hermite_e.hermegauss(6)),
    "uniform": (scipy.stats.uniform(-1, 2), *np.polynomial.legendre.leggauss(6)),
    "exponential": (scipy.stats.expon(), *np.polynomial.laguerre.laggauss(6)),
}


@pytest.mark.parametrize("name", QUADRATURES)
def test_moments_of_known_laws(name):
    """Gauss nodes as features, their weights as masses: exact for polynomials of degree 11, so no Monte Carlo error."""
    law, nodes, weights = QUADRATURES[name]
    measure = FeatureMeasure(torch.from_numpy(2 * nodes + 1)[:, None], torch.from_numpy(weights / weights.sum()))
    mean, variance, kurtosis = law.stats("mvk")
    np.testing.assert_allclose(moments(measure), [2 * mean + 1, 4 * variance, kurtosis], rtol=1e-10)


def test_the_kurtosis_of_a_constant_is_undefined():
    constant = moments(FeatureMeasure.uniform(torch.full((3, 7), 0.1, dtype=torch.float64)))
    assert constant.mean == pytest.approx(0.1)
    assert constant.variance == pytest.approx(0, abs=1e-30)
    assert math.isnan(constant.kurtosis)


# linear CKA


def slow_cka(a, b):
    """HSIC of the D x D Gram matrices with the centring matrix written out, Gretton et al. 2005,
    Kornblith et al. 2019.
    """
    n = a.dimension
    centring = np.eye(n) - np.ones((n, n)) / n
    grams = [centring @ (m.values.T * m.masses).numpy() @ m.values.numpy() @ centring for m in (a, b)]

    def hsic(first, second):
        return np.trace(first @ second) / (n - 1) ** 2

    return hsic(*grams) / math.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1]))


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(2, 9))
def test_cka_is_the_normalised_hsic_of_gram_matrices(seed, m, n, dimension):
    """Both ways of computing it occur: more probes than particles, and fewer."""
    a, b = shifted(cloud(m, dimension, seed), 1.0), cloud(n, dimension, seed + 2)
    np.testing.assert_allclose(linear_cka(a, b), slow_cka(a, b), rtol=1e-9)


@given(seeds, st.integers(2, 6), st.integers(3, 9))
def test_cka_ignores_orthogonal_maps_scale_and_offsets_but_not_linear_maps(seed, size, dimension):
    a = cloud(size, dimension, seed)
    orthogonal = torch.linalg.qr(normal((size + 1, size), seed + 2)).Q  # into one dimension more
    rotated = orthogonal @ (a.masses.sqrt()[:, None] * a.values) * math.sqrt(size + 1)
    b = FeatureMeasure.uniform(-7 * rotated + normal((size + 1, 1), seed + 3))
    np.testing.assert_allclose(linear_cka(a, b), 1, rtol=1e-9)
    stretched = FeatureMeasure(a.values * torch.tensor([100.0] + [1.0] * (size - 1))[:, None], a.masses)
    assert linear_cka(a, stretched) < 1 - 1e-6


def test_cka_of_uncorrelated_features_is_zero_and_of_constant_ones_undefined():
    waves = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]], dtype=torch.float64)
    first, second = (FeatureMeasure.uniform(wave[None]) for wave in waves)
    assert linear_cka(first, second) == pytest.approx(0, abs=1e-15)
    assert math.isnan(linear_cka(first, FeatureMeasure.uniform(torch.full((2, 4), 0.1, dtype=torch.float64))))


def slow_debiased(a, b):
    """U-centred Gram matrices of Szekely & Rizzo 2014: <A, B> / (n (n - 3)) is the estimate of Song et al. 2012."""
    n = a.dimension

    def centred(measure):
        gram = (measure.values.T * measure.masses).numpy() @ measure.values.numpy()
        gram = gram - np.diag(np.diag(gram))
        rows = gram.sum(1) / (n - 2)
        found = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
        return found - np.diag(np.diag(found))

    first, second = centred(a), centred(b)
    return (first * second).sum() / math.sqrt((first**2).sum() * (second**2).sum())


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.integers(5, 9))
def test_debiased_cka_is_the_cosine_of_u_centred_gram_matrices(seed, m, n, dimension):
    a, b = shifted(cloud(m, dimension, seed), 1.0), cloud(n, dimension, seed + 2)
    np.testing.assert_allclose(debiased_cka(a, b), slow_debiased(a, b), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(debiased_cka(a, cloned(a)), 1, rtol=1e-9)


def test_debiased_cka_of_independent_features_is_about_zero_and_the_plain_one_is_not():
    """64 features on 16 probes: the plain one finds 0.8 where there is nothing."""
    pairs = [(gaussian(64, 16, 2 * seed), gaussian(64, 16, 2 * seed + 1)) for seed in range(200)]
    debiased = [debiased_cka(*pair) for pair in pairs]
    assert abs(np.mean(debiased)) <= SIGMAS * np.std(debiased, ddof=1) / math.sqrt(len(pairs))
    assert np.mean([linear_cka(*pair) for pair in pairs]) == pytest.approx(0.8, abs=0.02)


def test_debiased_cka_needs_four_probes_and_features_that_vary():
    with pytest.raises(ValueError, match="3 probe values per feature; unbiased estimates need at least 4"):
        debiased_cka(gaussian(4, 3, 0), gaussian(4, 3, 1))
    assert math.isnan(debiased_cka(gaussian(4, 6, 0), FeatureMeasure.uniform(torch.full((2, 6), 0.1).double())))


def test_cka_never_forms_a_matrix_over_probes():
    values = normal((2, 200_000), 0)  # whose square would take 320 GB
    assert linear_cka(FeatureMeasure.uniform(values), FeatureMeasure.uniform(values[:1])) == pytest.approx(
        1 / math.sqrt(2), abs=0.01
    )


# null bands


def test_split_halves_are_the_renormalised_halves_of_the_particles_with_mass():
    values = torch.tensor([[0.0], [1.0], [5.0], [99.0]], dtype=torch.float64)
    measure = FeatureMeasure(values, torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64))
    band = split_half(measure, wasserstein, seeded(0), repetitions=60)
    # one of {0, 1, 5} against the other two: 0 | (1: 0.6, 5: 0.4), 1 | (0: 5/7, 5: 2/7), 5 | (0: 5/8, 1: 3/8)
    expected = np.sqrt([0.6 * 1 + 0.4 * 25, 5 / 7 * 1 + 2 / 7 * 16, 5 / 8 * 25 + 3 / 8 * 16])
    found = np.array(band.distances)
    assert len(found) == 60
    closest = np.abs(found[:, None] - expected).argmin(1)
    np.testing.assert_allclose(found, expected[closest], rtol=1e-9)
    counts = np.bincount(closest, minlength=3)
    assert abs(counts - 20).max() <= SIGMAS * math.sqrt(60 * 2 / 9)
    assert split_half(measure, wasserstein, seeded(0), 60) == band != split_half(measure, wasserstein, seeded(1), 60)


@pytest.mark.parametrize("name", ["W2", "sliced", "mmd"])
def test_the_split_half_band_separates_one_law_from_another(name):
    """Halves of one sample look like two samples of its size; another law lies beyond."""
    whole, other = gaussian(120, 3, 0), shifted(gaussian(60, 3, 1), 1.0)
    band = split_half(whole, DISTANCES[name], seeded(0), repetitions=40)
    same = [DISTANCES[name](gaussian(60, 3, 10 + seed), gaussian(60, 3, 50 + seed)) for seed in range(12)]
    assert min(band.distances) <= np.median(same) <= max(band.distances)
    assert band.interval[1] < 0.5 * DISTANCES[name](gaussian(60, 3, 2), other)


def test_unbiased_mmd_of_halves_is_about_zero():
    band = split_half(
        gaussian(60, 3, 4), lambda a, b: mmd(a, b, [1.0], unbiased=True).squared[0], seeded(0), repetitions=80
    )
    assert band.interval[0] < 0 < band.interval[1]


def test_null_band_takes_every_pair_once():
    points = [FeatureMeasure.uniform(torch.tensor([[float(v)]], dtype=torch.float64)) for v in (0, 1, 3, 7)]
    band = null_band(points, wasserstein)
    np.testing.assert_allclose(band.distances, [1, 3, 7, 2, 6, 4], rtol=1e-12)
    np.testing.assert_allclose([band.quantile(level) for level in (0, 0.5, 1)], [1, 3.5, 7], rtol=1e-12)
    np.testing.assert_allclose(band.interval, [1.25, 6.75], rtol=1e-12)


def test_untrained_networks_fall_into_the_band_of_others():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(3),))
    inputs = random_inputs(arch, 5, seed=3)
    drawn = [starts.start(arch, (40,), inputs, seeded(seed)) for seed in range(12)]
    measures = [FeatureMeasure.of(start, inputs, 0) for start in drawn]
    band = null_band(measures[:8], wasserstein)
    fresh = [wasserstein(*measures[8 + 2 * k : 10 + 2 * k]) for k in range(2)]
    assert all(0.5 * min(band.distances) < each < 2 * max(band.distances) for each in fresh)
    louder = FeatureMeasure(3 * measures[0].values, measures[0].masses)
    assert wasserstein(louder, measures[1]) > max(band.distances)


# dtypes, devices, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_distance_runs_on_every_device_and_dtype(dtype, device):
    a, b = cloud(6, 4, 0), cloud(5, 4, 2)
    moved = [FeatureMeasure(each.values.to(device, dtype), each.masses.to(device, dtype)) for each in (a, b)]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for name, distance in DISTANCES.items():
        np.testing.assert_allclose(distance(*moved), distance(a, b), rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(moments(moved[0]), moments(a), rtol=10 * tolerance)
    halves = [split_half(each, wasserstein, seeded(0), 3).distances for each in (a, moved[0])]
    np.testing.assert_allclose(halves[1], halves[0], rtol=tolerance)
    torch.testing.assert_close(
        moved[0].standardised().values.double().cpu(), a.standardised().values, rtol=tolerance, atol=tolerance
    )


GOOD = FeatureMeasure.uniform(torch.eye(3))
BAD_CALLS = {
    r"values has shape \(3,\); expected \(M, D\)": lambda: FeatureMeasure(torch.ones(3), torch.ones(3) / 3),
    r"values has shape \(0, 4\); expected \(M, D\)": lambda: FeatureMeasure.uniform(torch.ones(0, 4)),
    r"values must be a torch.Tensor .*, not list": lambda: FeatureMeasure([[1.0]], torch.ones(1)),  # type: ignore[arg-type]
    r"masses has shape \(2,\); expected \(3,\)": lambda: FeatureMeasure(torch.eye(3), torch.ones(2) / 2),
    r"least entry 0.5 and the sum 1.5": lambda: FeatureMeasure(torch.eye(3), torch.full((3,), 0.5)),
    r"least entry -1 and the sum 1;": lambda: FeatureMeasure(torch.eye(3), torch.tensor([1.0, 1.0, -1.0])),
    r"values\[1, 2\] is nan": lambda: FeatureMeasure.uniform(torch.tensor([[0.0, 0, 0], [0, 0, math.nan]])),
    r"one dtype, float32 or float64.*got .*int64": lambda: FeatureMeasure(torch.eye(3).long(), torch.ones(3) / 3),
    r"a has 3 probe values per feature and b has 2": lambda: wasserstein(GOOD, FeatureMeasure.uniform(torch.eye(2))),
    r"p=0.5 must be at least 1": lambda: wasserstein(GOOD, GOOD, 0.5),
    r"b has 2001 particles, exact transport takes 2000; use sliced_wasserstein": lambda: wasserstein(
        GOOD, FeatureMeasure.uniform(torch.ones(2001, 3))
    ),
    r"projections=1 must be an integer of at least 2": lambda: sliced_wasserstein(
        GOOD, GOOD, generator=seeded(0), projections=1
    ),
    r"bandwidths=0.0 must be greater than 0": lambda: mmd(GOOD, GOOD, [1.0, 0.0]),
    r"b has mass on one particle only": lambda: mmd(GOOD, FeatureMeasure.uniform(torch.ones(1, 3)), unbiased=True),
    r"measure has 1 particle with mass": lambda: split_half(
        FeatureMeasure.uniform(torch.ones(1, 3)), wasserstein, seeded(0)
    ),
    r"measures has 1 entries": lambda: null_band([GOOD], wasserstein),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument_what_came_and_what_is_right(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message]()


@pytest.mark.parametrize("layer", [1, -1])
def test_layers_are_counted_from_zero(layer):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2),))
    with pytest.raises(ValueError, match=f"layer={layer}"):
        FeatureMeasure.of(random_network(arch, (2,), 0), random_inputs(arch, 1, 0), layer)
