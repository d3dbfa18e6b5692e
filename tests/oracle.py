"""The method once more, in plain NumPy and float64, written from the papers.

Every result of the library is compared with this.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

import numpy as np

# Noise paths


@dataclasses.dataclass(frozen=True)
class Path:
    """x_t = alpha(t) x0 + sigma(t) noise, and how to walk toward the data."""

    alpha: Callable
    sigma: Callable
    toward_data: Callable
    span: float = 1.0
    steps: int | None = None


def linear(noise_at):
    return _unit_time(lambda r: 1 - r, lambda r: r, noise_at)


def cosine_path(noise_at):
    alpha = lambda r: np.cos(math.pi * r / 2)  # noqa: E731
    sigma = lambda r: np.sin(math.pi * r / 2)  # noqa: E731
    return _unit_time(alpha, sigma, noise_at)


def _unit_time(alpha, sigma, noise_at):
    if noise_at == 1:
        return Path(alpha, sigma, lambda t, gap: np.maximum(t - gap, 0))
    reversed_alpha = lambda t: alpha(1 - t)  # noqa: E731
    reversed_sigma = lambda t: sigma(1 - t)  # noqa: E731
    return Path(reversed_alpha, reversed_sigma, lambda t, gap: np.minimum(t + gap, 1))


def ddpm():
    """DiT's and DDPM's 1000 steps: abar is the cumulative product of 1 - beta."""
    abar = alphas_cumprod()
    return Path(
        alpha=lambda t: np.sqrt(abar[t]),
        sigma=lambda t: np.sqrt(1 - abar[t]),
        toward_data=lambda t, gap: np.maximum(t - gap, 0),
        span=1000,
        steps=1000,
    )


def alphas_cumprod():
    """Betas rise linearly from 1e-4 to 0.02."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def edm(sigma_min=0.002, sigma_max=80.0):
    """Time is sigma; a gap is a fraction of the axis ln(sigma)."""

    def toward_data(t, gap):
        lowered = np.log(np.maximum(t, 1e-300)) - gap
        clamped = np.exp(np.maximum(lowered, math.log(sigma_min)))
        return np.where(t < sigma_min, t, clamped)  # a student below sigma_min stays where it is

    return Path(np.ones_like, lambda t: t, toward_data, math.log(sigma_max / sigma_min))


def _per_sample(weights, like):
    return np.asarray(weights, "float64").reshape((-1,) + (1,) * (like.ndim - 1))


def add_noise(path, x0, noise, t):
    return _per_sample(path.alpha(t), x0) * x0 + _per_sample(path.sigma(t), x0) * noise


def velocity(path, x0, noise, t, h=1e-6):
    """dx_t/dt by central differences; on discrete paths the v-prediction."""
    if path.steps:
        return _per_sample(path.alpha(t), x0) * noise - _per_sample(path.sigma(t), x0) * x0
    return (add_noise(path, x0, noise, t + h) - add_noise(path, x0, noise, t - h)) / (2 * h)


def snr(path, t):
    with np.errstate(divide="ignore"):
        return (path.alpha(t) / path.sigma(t)) ** 2


def teacher_time(path, t, u, max_gap):
    if path.steps:
        return path.toward_data(t, np.floor(u * round(max_gap * path.steps)).astype(int))
    return path.toward_data(t, u * max_gap * path.span)


def add_less_noise(path, x0, noise, t, u, max_gap):
    """What the teacher sees, and its times."""
    moved = teacher_time(path, t, u, max_gap)
    return add_noise(path, x0, noise, moved), moved


def lognormal(u, mean=-1.2, deviation=1.2):
    """EDM's noise levels of training: ln(sigma) is normal; `u` are its quantiles, inside (0, 1)."""
    normal = statistics.NormalDist(mean, deviation)
    return np.exp([normal.inv_cdf(float(value)) for value in np.ravel(u)]).reshape(np.shape(u))


# Distances


def cosine(student, target, axis=-1):
    norms = np.linalg.norm(student, axis=axis) * np.linalg.norm(target, axis=axis)
    return 1 - np.sum(student * target, axis=axis) / norms


def token_axis_cosine(student, target):
    """One value per sample: the mean over the features."""
    return cosine(student, target, axis=1).mean(-1)


def smooth_l1_elements(d, beta=0.05):
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2)


def smooth_l1(student, target, beta=0.05):
    return smooth_l1_elements(np.abs(student - target), beta).mean(-1)


def l1(student, target):
    return np.abs(student - target).mean(-1)


def l2(student, target):
    return ((student - target) ** 2).mean(-1)


DISTANCES = {
    "cosine": cosine,
    "smooth_l1": smooth_l1,
    "l1": l1,
    "l2": l2,
    "token_axis_cosine": token_axis_cosine,
}


def masked_mean(values, mask=None):
    """The mean of distances [B, N] or [B] over what a mask keeps; 0 where that is nothing."""
    if mask is None:
        return values.mean()
    weights = np.asarray(mask, "float64")
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    weights = np.broadcast_to(weights, values.shape)
    return (values * weights).sum() / weights.sum() if weights.any() else 0.0


# Normalisations of a target


def standardise(target, mask=None, epsilon=1e-6):
    """Each feature over the tokens that count: mean 0, standard deviation 1."""
    result = np.empty_like(target)
    weights = _token_weights(target, mask).ravel()
    for feature in range(target.shape[-1]):
        values = target[..., feature]
        mean = np.average(values.ravel(), weights=weights)
        variance = np.average((values.ravel() - mean) ** 2, weights=weights)
        result[..., feature] = (values - mean) / (np.sqrt(variance) + epsilon)
    return result


def centre(target, mask=None):
    """At each place, the mean of the samples that count there is taken away."""
    result = target.copy()
    weights = _token_weights(target, mask)
    for place in range(target.shape[1]):
        if weights[:, place].any():
            result[:, place] -= np.average(target[:, place], axis=0, weights=weights[:, place])
    return result


def _token_weights(target, mask):
    """A weight for each token, [B, N]."""
    if mask is None:
        return np.ones(target.shape[:2])
    weights = np.asarray(mask, "float64")
    return np.repeat(weights[:, None], target.shape[1], axis=1) if weights.ndim == 1 else weights


NORMALISATIONS = {
    "none": lambda target, mask=None: target,
    "standardise": standardise,
    "centre": centre,
}


# The term


def loss(distance, weight, student, target):
    """weight * mean over samples and tokens of the distance."""
    return weight * DISTANCES[distance](student, target).mean()


def term(student, target, distance="cosine", weight=1.0, normalise="none", mask=None):
    """The term of SRA, LayerSync and REPA, of student tokens that are projected already."""
    compared = NORMALISATIONS[normalise](target, mask)
    return weight * masked_mean(DISTANCES[distance](student, compared), mask)


def gradient(function, x, h=1e-6):
    """d function / d x by central differences."""
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = h
        result[index] = (function(x + step) - function(x - step)) / (2 * h)
    return result


# Heads


def silu(x):
    return x / (1 + np.exp(-x))


def project(params, tokens):
    """SRA's projector: Linear - SiLU - Linear."""
    hidden = tokens @ params["hidden_kernel"] + params["hidden_bias"]
    return silu(hidden) @ params["output_kernel"] + params["output_bias"]


def mlp_shapes(layers, width, hidden, target_width):
    """Names and shapes of the parameters of a head of `layers` linear layers, in their order."""
    names = ["hidden"] + [f"hidden_{n}" for n in range(2, layers)] + ["output"]
    sizes = [width] + [hidden] * (layers - 1) + [target_width]
    shapes = {}
    for n, name in enumerate(names):
        shapes[f"{name}_kernel"] = (sizes[n], sizes[n + 1])
        shapes[f"{name}_bias"] = (sizes[n + 1],)
    return shapes


def mlp(layers, params, tokens):
    """Linear - SiLU - ... - Linear with `layers` linear layers; 0 is no head."""
    if layers == 0:
        return tokens
    x = tokens @ params["hidden_kernel"] + params["hidden_bias"]
    for n in range(2, layers):
        x = silu(x) @ params[f"hidden_{n}_kernel"] + params[f"hidden_{n}_bias"]
    return silu(x) @ params["output_kernel"] + params["output_bias"]


def xavier_uniform(draws):
    """Draws from [0, 1) on [-a, a), a = sqrt(6 / (fan in + fan out))."""
    bound = math.sqrt(6 / (draws.shape[0] + draws.shape[1]))
    return -bound + 2 * bound * draws


# Averages and weights


def ema(teacher, student, decay):
    return decay * teacher + (1 - decay) * student


def paper_weight(base, epoch, resolution=256):
    """Flat to epoch 149 (512 px: 99), then one decade per 1000 (512 px: 800) epochs."""
    flat, decade = {256: (149, 1000), 512: (99, 800)}[resolution]
    return base if epoch <= flat else base * 10 ** (-(epoch - flat) / decade)
