"""The formulas of the study's rules and of its distillation with plain loops in float64; see tests/loss/oracle.py."""

from math import log

import numpy as np

from ...loss.oracle import anchored, log_sum_exp


def normalised_weights(theta: np.ndarray, share: float) -> np.ndarray:
    """Softplus weights that sum to one, anchored at z_0."""
    return anchored(np.array([log(1 + np.exp(t)) for t in theta]), share)


def grad_theta_of_normalised(theta: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Derivative of Σ w L / Σ w by theta, w = softplus(theta)."""
    w = [log(1 + np.exp(t)) for t in theta]
    mean = sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w)
    slope = [1 / (1 + np.exp(-t)) for t in theta]
    return np.array([s * (loss - mean) / sum(w) for s, loss in zip(slope, losses, strict=True)])


def inverse_losses(losses: np.ndarray) -> np.ndarray:
    """Softmax of the inverse losses, those divided by their mean."""
    inverse = [1 / loss for loss in losses]
    e = [np.exp(i * len(inverse) / sum(inverse)) for i in inverse]
    return np.array([x / sum(e) for x in e])


def kl_of_classes(teacher: np.ndarray, student: np.ndarray, valid: np.ndarray) -> float:
    """Mean over the valid pixels of Σ p (log p − log q), for logits (B, C, *spatial) and valid (B, *spatial)."""
    total = 0.0
    for b, *pixel in np.argwhere(valid):
        t, s = (z[(b, slice(None), *pixel)] for z in (teacher, student))
        p, q = (np.exp(x - log_sum_exp(x)) for x in (t, s))
        total += sum(p * np.log(p / q))
    return total / max(valid.sum(), 1)


def kl_of_regions(teacher: np.ndarray, student: np.ndarray, valid: np.ndarray) -> float:
    """The same with a divergence for each region by itself, summed over regions."""
    total = 0.0
    for b, *pixel in np.argwhere(valid):
        for t, s in zip(*(z[(b, slice(None), *pixel)] for z in (teacher, student)), strict=True):
            p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
            total += p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return total / max(valid.sum(), 1)
