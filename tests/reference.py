"""Slow, obvious twins of the library's formulas: explicit loops over images, particles, positions and offsets.

Nothing here calls the library's own arithmetic, `solve` apart; networks, problems and points are only read.
"""

import math
import warnings
from functools import lru_cache
from itertools import product

import numpy as np
from scipy import optimize, special

from meanfield.solvers import reference as cvxpy_reference

ACTIVATIONS = {
    "relu": lambda g: max(g, 0.0),
    "tanh": math.tanh,
    "softplus": lambda g: float(np.logaddexp(0, g)),
    "gelu": lambda g: g * float(special.ndtr(g)),
    "identity": lambda g: g,
}


def solve(program, **options):
    """The reference solution; cvxpy's remark on accuracy is left to the certificate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
        return cvxpy_reference.solve(program, **options)


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def shifted(image, row, column, conv, offset):
    """(T_s image) at output position (row, column) for the offset s = (offset row, offset column)."""
    y = row * conv.stride[0] + offset[0] - conv.padding[0]
    x = column * conv.stride[1] + offset[1] - conv.padding[1]
    inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
    return image[y, x] if inside else 0.0


def output_size(image, conv):
    return [
        (image.shape[axis] + 2 * conv.padding[axis] - conv.kernel[axis]) // conv.stride[axis] + 1 for axis in (0, 1)
    ]


def offsets_of(conv):
    return list(product(range(conv.kernel[0]), range(conv.kernel[1])))


def positions_of(conv, image):
    height, width = output_size(image, conv)
    return list(product(range(height), range(width)))


def convolve(signal, kernel, weights, bias, conv):
    """sum_i weights_i sum_s kernel[i, s] (T_s signal_i)_q + bias, one image and one target: (C, H, W) -> (H', W')."""
    result = np.full(output_size(signal[0], conv), float(bias))
    for q in positions_of(conv, signal[0]):
        for i, image in enumerate(signal):
            for s in offsets_of(conv):
                result[q] += weights[i] * kernel[i][s] * shifted(image, *q, conv, s)
    return result


def activate(g, conv):
    h = np.array([[ACTIVATIONS[conv.activation.name](value) for value in row] for row in g])
    if conv.pooling == "none":
        return h
    height, width = conv.pool_size
    reduce = {"average": np.mean, "max": np.max}[conv.pooling]
    rows, columns = h.shape[0] // height, h.shape[1] // width
    return np.array(
        [
            [reduce(h[a * height : (a + 1) * height, b * width : (b + 1) * width]) for b in range(columns)]
            for a in range(rows)
        ]
    )


def read(features, amounts):
    """sum_j <U_j, f_j> with U_j = u_j p_j: features (M, H, W), amounts (K, M) or (K, M, P)."""
    output = np.zeros(len(amounts))
    for k, j in product(range(amounts.shape[0]), range(amounts.shape[1])):
        flat = features[j].ravel()
        for q, value in enumerate(flat):
            output[k] += (amounts[k, j] if amounts.ndim == 2 else amounts[k, j, q]) * value / len(flat)
    return output


def respond(network, inputs):
    """Per image: pre-activations and features of every layer, and the output F."""
    arch, masses, kernels = (
        network.architecture,
        [array(p) for p in network.masses],
        [array(w) for w in network.kernels],
    )
    readout = array(network.readout)
    weights = [np.full(arch.input_shape[0], 1 / arch.input_shape[0]), *masses[:-1]]
    every = []
    for image in array(inputs):
        signal, g, f = list(image), [], []
        for layer, conv in enumerate(arch.layers):
            width = range(len(masses[layer]))
            bias = np.zeros(len(width)) if network.biases[layer] is None else array(network.biases[layer])
            g.append(np.array([convolve(signal, kernels[layer][j], weights[layer], bias[j], conv) for j in width]))
            f.append(np.array([activate(map_, conv) for map_ in g[-1]]))
            signal = f[-1]
        amounts = np.array(
            [[readout[k, j] * masses[-1][j] for j in range(len(masses[-1]))] for k in range(arch.outputs)]
        )
        every.append((g, f, read(signal, amounts)))
    return every


@lru_cache(maxsize=4)
def frozen_maps(program):
    """g and f of every layer, (N, M, H, W) each, as the frozen network has them; no candidates."""
    responses, layers = respond(program.frozen, program.problem.inputs), range(program.depth)
    return tuple([np.array([maps[kind][layer] for maps in responses]) for layer in layers] for kind in (0, 1))


def kernel_norm(kernel, penalty):
    return (
        math.sqrt(sum(v * v for v in kernel.ravel()))
        if penalty.kernel_norm == "l2"
        else sum(abs(v) for v in kernel.ravel())
    )


def loss_value(name, output, target):
    if name == "squared":
        return sum(0.5 * (a - b) ** 2 for a, b in zip(output, target))
    if name == "logistic":
        return sum(float(np.logaddexp(0, -b * a)) for a, b in zip(output, target))
    return float(special.logsumexp(output)) - output[int(target)]


def mean_loss(problem, outputs):
    return np.mean([loss_value(problem.loss.name, F, y) for F, y in zip(outputs, problem.targets.cpu().numpy())])


def objective_terms(problem, network):
    """Loss, source, readout and input term of J, bounds left aside."""
    penalty, p, w = problem.penalty, [array(m) for m in network.masses], [array(k) for k in network.kernels]
    source = 0.0
    for layer in range(1, len(p)):
        for i, mass in enumerate(p[layer - 1]):
            outflow = sum(kernel_norm(w[layer][j, i], penalty) * p[layer][j] for j in range(len(p[layer])))
            source += mass * outflow**penalty.power
    u = array(network.readout)
    readout = sum(p[-1][j] * (u[:, j] ** 2).sum() ** (penalty.power / 2) for j in range(len(p[-1])))
    return (
        mean_loss(problem, [F for _, _, F in respond(network, problem.inputs)]),
        penalty.source * source,
        penalty.readout * readout,
        penalty.input * sum(p[0][i] * input_cost(network, i) for i in range(len(p[0]))),
    )


def input_cost(network, particle):
    bias = network.biases[0]
    return float((array(network.kernels[0])[particle] ** 2).sum()) + (
        0.0 if bias is None else float(bias[particle]) ** 2
    )


def perspective(amount, mass, power=2):
    if mass == 0:
        return 0.0 if amount == 0 else math.inf
    return amount**power / mass ** (power - 1)


def largest_gain(pull, strength, power):
    """The conjugate of strength t^power at a pull: the gain at the t where the slope of the power is the pull."""
    t = (pull / (strength * power)) ** (1 / (power - 1))
    return pull * t - strength * t**power


def program_value(program, point):
    problem, penalty = program.problem, program.problem.penalty
    last = frozen_maps(program)[1][-1]
    value = mean_loss(problem, [read(features, array(point.readout)) for features in last])
    for W, p in zip(point.kernels, point.masses):
        W = array(W)
        for i, mass in enumerate(array(p)):
            value += penalty.source * perspective(
                sum(kernel_norm(W[j, i], penalty) for j in range(len(W))), mass, penalty.power
            )
    U = array(point.readout)
    for j, mass in enumerate(array(point.masses[-1])):
        value += penalty.readout * perspective(math.sqrt((U[:, j] ** 2).sum()), mass, penalty.power)
    return value + penalty.input * sum(p * input_cost(program.frozen, i) for i, p in enumerate(array(point.masses[0])))


def realisation_residual(program, point, layer):
    """sum_i sum_s W_ijs T_s f_i + B_j - p_j g_j, (N, M_l, H', W')."""
    conv, W, p = program.problem.architecture.layers[layer], array(point.kernels[layer - 1]), array(point.masses[layer])
    B = np.zeros(len(p)) if point.biases[layer - 1] is None else array(point.biases[layer - 1])
    g, f = frozen_maps(program)[0][layer], frozen_maps(program)[1][layer - 1]
    rows = []
    for n in range(len(f)):
        ones = np.ones(len(f[n]))
        rows.append([convolve(f[n], W[j], ones, B[j], conv) - p[j] * g[n, j] for j in range(len(p))])
    return np.array(rows)


def conjugate(name, dual, target):
    if name == "squared":
        return sum(0.5 * s * s + s * y for s, y in zip(dual, target))
    if name == "logistic":
        v = np.array([-y * s for s, y in zip(dual, target)])
        return float(-special.entr(v).sum() - special.entr(1 - v).sum()) if ((v >= 0) & (v <= 1)).all() else math.inf
    v = np.array(dual, dtype=float)
    v[int(target)] += 1
    return float(-special.entr(v).sum()) if (v >= 0).all() and abs(v.sum() - 1) < 1e-12 else math.inf


def numerical_conjugate(name, dual, target):
    """sup_F <s, F> - loss(F, y) by quasi-Newton from zero."""
    found = optimize.minimize(
        lambda F: loss_value(name, F, target) - F @ dual, np.zeros(len(dual)), method="BFGS", options={"gtol": 1e-9}
    )
    return -found.fun


def numerical_prox(name, center, target, weight):
    """The value min_F loss(F, y) + weight/2 |F - center|^2."""
    merit = lambda F: loss_value(name, F, target) + 0.5 * weight * ((F - center) ** 2).sum()  # noqa: E731
    return min(
        optimize.minimize(merit, center, method=method, options=options).fun
        for method, options in (
            ("BFGS", {"gtol": 1e-9}),
            ("Nelder-Mead", {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000}),
        )
    )


def design(features, conv):
    """A, one row per image and position, one column per source and offset, and one for the bias."""
    rows = [
        [shifted(image, *q, conv, s) for image in maps for s in offsets_of(conv)] + [1.0] * conv.bias
        for maps in features
        for q in positions_of(conv, maps[0])
    ]
    return np.array(rows)


def realising(A, pulls, centred):
    """beta with A^T beta nearest to the pulls b, (M, columns) -> (M, rows), of sum zero where it has to be centred."""
    allowed = np.eye(len(A)) - centred / len(A)
    left, values, right = np.linalg.svd(A.T @ allowed, full_matrices=False)
    kept = values > 1e-10 * np.linalg.norm(A, 2)
    return ((pulls @ left[:, kept]) / values[kept]) @ right[kept] @ allowed.T


class DualTwin:
    """The dual value of (scaled) multipliers whose output part lies in the conjugate's domain."""

    def __init__(self, program, multipliers):
        self.program, self.penalty = program, program.problem.penalty
        self.r = array(multipliers.output)
        self.kappa = multipliers.amplitude and [np.maximum(array(k), 0) for k in multipliers.amplitude]
        self.layers = [self._price(layer, array(pulls)) for layer, pulls in enumerate(multipliers.realisation, start=1)]
        self.readout = self._readout_norms()
        self.costs = self.penalty.input * np.array([input_cost(program.frozen, i) for i in range(program.widths[0])])

    def _price(self, layer, pulls):
        conv = self.program.problem.architecture.layers[layer]
        g, f = frozen_maps(self.program)[0][layer], frozen_maps(self.program)[1][layer - 1]
        centred = conv.bias and self.penalty.amplitude_bound is None
        beta = realising(design(f, conv), pulls, centred).reshape(len(pulls), len(f), -1)
        norms = np.zeros((beta.shape[0], f.shape[1]))
        for j, i in product(*map(range, norms.shape)):
            norms[j, i] = self._dual_norm([self._paired(beta[j], f[:, i], conv, s) for s in offsets_of(conv)])
        pairing = np.array([sum((beta[j, n] * g[n, j].ravel()).sum() for n in range(len(f))) for j in range(len(beta))])
        free = (
            np.abs(beta.sum((1, 2))) if conv.bias and self.penalty.amplitude_bound is not None else np.zeros(len(beta))
        )
        return norms, pairing, free

    def _paired(self, beta, feature, conv, offset):
        """sum_{n,q} beta(n, q) (T_s f(n))_q."""
        return sum(
            beta[n, index] * shifted(image, *q, conv, offset)
            for n, image in enumerate(feature)
            for index, q in enumerate(positions_of(conv, image))
        )

    def _dual_norm(self, entries):
        return (
            math.sqrt(sum(v * v for v in entries)) if self.penalty.kernel_norm == "l2" else max(abs(v) for v in entries)
        )

    def _readout_norms(self):
        last, flat = frozen_maps(self.program)[1][-1], self.program.problem.architecture.readout == "flatten"
        found = []
        for j in range(last.shape[1]):
            maps = np.array([image.ravel() / image.size for image in last[:, j]])
            seen = maps if flat else maps.sum(1, keepdims=True)
            found.append(
                math.sqrt(
                    sum((self.r[:, k] @ seen[:, q]) ** 2 for k in range(self.r.shape[1]) for q in range(seen.shape[1]))
                )
            )
        return np.array(found)

    def value(self, scale=1.0):
        """Dual value of the multipliers times `scale`; with a bound, mu of every layer below the last is minimised
        numerically.
        """
        targets, name = self.program.problem.targets.cpu().numpy(), self.program.problem.loss.name
        fit = np.mean([conjugate(name, len(self.r) * scale * s, y) for s, y in zip(self.r, targets)])
        if not math.isfinite(fit):
            return -math.inf
        if self.penalty.amplitude_bound is None:
            return -fit - self._masses(scale)
        return -fit - (self._masses_bounded(scale) if self.kappa is None else self._masses_given(scale))

    def _last(self, gamma, scale):
        return (largest_gain(scale * self.readout, self.penalty.readout, self.penalty.power) - gamma).max()

    def _masses(self, scale):
        total, gamma = 0.0, self.costs
        for norms, pairing, _ in self.layers:
            t = (scale * norms).max(0)
            total += (largest_gain(t, self.penalty.source, self.penalty.power) - gamma).max()
            gamma = scale * pairing
        return total + self._last(gamma, scale)

    def _masses_given(self, scale):
        """Each mu_l as kappa asks for it, then the least kappa that this mu_l leaves."""
        total, gamma, bound = 0.0, self.costs, self.penalty.amplitude_bound
        for (norms, pairing, free), kappa in zip(self.layers, self.kappa):
            pairs = list(product(*map(range, norms.shape)))
            mu = max(
                max(scale * (norms[j, i] - kappa[j]), 0.0) ** 2 / (4 * self.penalty.source) - gamma[i] for j, i in pairs
            )
            least = np.zeros(len(norms))
            for j, i in pairs:
                carried = math.sqrt(4 * self.penalty.source * max(mu + gamma[i], 0.0))
                least[j] = max(least[j], scale * norms[j, i] - carried)
            gamma = np.array([scale * pairing[j] - bound * (least[j] + scale * free[j]) for j in range(len(least))])
            total += mu
        return total + self._last(gamma, scale)

    def _masses_bounded(self, scale):
        def total(excess):
            result, gamma = 0.0, self.costs
            for (norms, pairing, free), more in zip(self.layers, excess):
                mu = (-gamma).max() + more
                kappa = np.maximum(scale * norms - np.sqrt(4 * self.penalty.source * np.maximum(mu + gamma, 0)), 0).max(
                    1
                )
                gamma = scale * pairing - self.penalty.amplitude_bound * (kappa + scale * free)
                result += mu
            return result + self._last(gamma, scale)

        if len(self.layers) == 0:
            return total([])
        if len(self.layers) > 1:
            raise NotImplementedError("the twin minimises over one bounded layer only")
        norms = self.layers[0][0]
        most = ((scale * norms).max(0) ** 2 / (4 * self.penalty.source) - self.costs).max() + self.costs.min()
        grid = np.linspace(0, max(most, 0), 200)
        step = grid[1]
        near = min(grid, key=lambda x: total([x]))
        fine = optimize.minimize_scalar(
            lambda x: total([x]),
            bounds=(max(near - step, 0), near + step + 1e-300),
            method="bounded",
            options={"xatol": 1e-13},
        )
        return min(fine.fun, total([near]))

    def best(self):
        """The largest value over scales in [0, 2]."""
        grid = np.linspace(0, 2, 41)
        near = max(grid, key=self.value)
        lower = lambda scale: -max(self.value(scale), -1e9)  # noqa: E731
        fine = optimize.minimize_scalar(
            lower, bounds=(max(near - 0.05, 0), near + 0.05), method="bounded", options={"xatol": 1e-10}
        )
        return max(-fine.fun, self.value(near), self.value(1.0))
