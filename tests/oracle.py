"""The method once more, in plain NumPy and float64, written from the papers: what every result is compared with."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


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
    return _unit_time(lambda r: np.cos(math.pi * r / 2), lambda r: np.sin(math.pi * r / 2), noise_at)


def _unit_time(alpha, sigma, noise_at):
    if noise_at == 1:
        return Path(alpha, sigma, lambda t, gap: np.maximum(t - gap, 0))
    return Path(lambda t: alpha(1 - t), lambda t: sigma(1 - t), lambda t, gap: np.minimum(t + gap, 1))


def ddpm():
    """DiT's and DDPM's 1000 steps: abar is the cumulative product of 1 - beta, beta from 1e-4 to 0.02."""
    abar = alphas_cumprod()
    return Path(
        lambda t: np.sqrt(abar[t]), lambda t: np.sqrt(1 - abar[t]), lambda t, gap: np.maximum(t - gap, 0), 1000, 1000
    )  # fmt: skip


def alphas_cumprod():
    return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def edm(sigma_min=0.002, sigma_max=80.0):
    """Time is sigma; the gap is a share of the axis ln(sigma). A student below sigma_min stays where it is."""
    return Path(
        np.ones_like,
        lambda t: t,
        lambda t, gap: np.where(t < sigma_min, t, np.exp(np.maximum(np.log(np.maximum(t, 1e-300)) - gap, math.log(sigma_min)))),
        math.log(sigma_max / sigma_min),
    )


def _per_sample(weights, like):
    return np.asarray(weights, "float64").reshape((-1,) + (1,) * (like.ndim - 1))


def add_noise(path, x0, noise, t):
    return _per_sample(path.alpha(t), x0) * x0 + _per_sample(path.sigma(t), x0) * noise


def velocity(path, x0, noise, t, h=1e-6):
    """dx_t/dt by central differences; on discrete paths the v-prediction, alpha noise - sigma x0."""
    if path.steps:
        return _per_sample(path.alpha(t), x0) * noise - _per_sample(path.sigma(t), x0) * x0
    return (add_noise(path, x0, noise, t + h) - add_noise(path, x0, noise, t - h)) / (2 * h)


def snr(path, t):
    with np.errstate(divide="ignore"):
        return (path.alpha(t) / path.sigma(t)) ** 2


def teacher_time(path, t, u, max_gap):
    gap = u * max_gap * path.span
    return path.toward_data(t, np.floor(u * round(max_gap * path.steps)).astype(int) if path.steps else gap)


def cosine(student, teacher, axis=-1):
    norms = np.linalg.norm(student, axis=axis) * np.linalg.norm(teacher, axis=axis)
    return 1 - np.sum(student * teacher, axis=axis) / norms


def token_axis_cosine(student, teacher):
    return cosine(student, teacher, axis=1)


def smooth_l1_elements(d, beta=0.05):
    return np.where(d < beta, d**2 / (2 * beta), d - beta / 2)


def smooth_l1(student, teacher, beta=0.05):
    return smooth_l1_elements(np.abs(student - teacher), beta).mean(-1)


def l1(student, teacher):
    return np.abs(student - teacher).mean(-1)


def l2(student, teacher):
    return ((student - teacher) ** 2).mean(-1)


DISTANCES = {"cosine": cosine, "smooth_l1": smooth_l1, "l1": l1, "l2": l2, "official-2026-07": token_axis_cosine}


def loss(distance, weight, student, teacher):
    """weight * mean over samples and tokens of the distance."""
    return weight * DISTANCES[distance](student, teacher).mean()


def gradient(function, x, h=1e-6):
    """d function / d x by central differences."""
    result = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = h
        result[index] = (function(x + step) - function(x - step)) / (2 * h)
    return result


def project(params, tokens):
    """Linear - SiLU - Linear, silu(x) = x / (1 + e^-x)."""
    hidden = tokens @ params["hidden_kernel"] + params["hidden_bias"]
    return (hidden / (1 + np.exp(-hidden))) @ params["output_kernel"] + params["output_bias"]


def xavier_uniform(draws):
    """Draws from [0, 1) on [-a, a), a = sqrt(6 / (fan in + fan out))."""
    bound = math.sqrt(6 / (draws.shape[0] + draws.shape[1]))
    return -bound + 2 * bound * draws


def ema(teacher, student, decay):
    return decay * teacher + (1 - decay) * student


def paper_weight(base, epoch, resolution=256):
    """Flat to epoch 149 (512 px: 99), then one decade per 1000 (512 px: 800) epochs."""
    flat, decade = {256: (149, 1000), 512: (99, 800)}[resolution]
    return base if epoch <= flat else base * 10 ** (-(epoch - flat) / decade)
