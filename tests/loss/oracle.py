"""The method written again from its formulas with plain loops in float64.

Slow and obvious on purpose: numpy arrays (B, C, *spatial), one map, one sample, one pixel at a time. Nothing
here imports the engine.
"""

from itertools import product
from math import log

import numpy as np

SMOOTH = 1e-5  # nnU-Net's, in numerator and denominator of Dice


def subsets(num_scales: int) -> list[tuple[int, ...]]:
    """All subsets of at least two scales, by counting in binary."""
    found = []
    for bits in range(2**num_scales):
        members = tuple(j for j in range(num_scales) if bits >> j & 1)
        if len(members) >= 2:
            found.append(members)
    return found


def taps(coarse: int, fine: int) -> list[list[tuple[int, float]]]:
    """For each fine position along one axis the coarse positions and their weights (align_corners=False)."""
    result = []
    for position in range(fine):
        centre = max((position + 0.5) * coarse / fine - 0.5, 0.0)
        low = int(centre)
        high = min(low + 1, coarse - 1)
        result.append([(low, 1 - (centre - low)), (high, centre - low)])
    return result


def resample(z: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bilinear or trilinear, a pixel at a time."""
    z = np.asarray(z, dtype=np.float64)
    axes = [taps(coarse, fine) for coarse, fine in zip(z.shape[2:], size, strict=True)]
    fine = np.zeros((*z.shape[:2], *size))
    for pixel in np.ndindex(*size):
        for corner in product(*(axis[p] for axis, p in zip(axes, pixel, strict=True))):
            where = tuple(position for position, _ in corner)
            weight = np.prod([w for _, w in corner])
            fine[(..., *pixel)] += weight * z[(..., *where)]
    return fine


def add(scales: list[np.ndarray]) -> np.ndarray:
    logits = np.zeros_like(scales[0])
    for z in scales:
        logits = logits + z
    return logits


def multiply(scales: list[np.ndarray]) -> np.ndarray:
    logits = np.ones_like(scales[0])
    for z in scales:
        logits = logits * z
    return logits


def concat(scales: list[np.ndarray], weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """`weight` is (C, |c| * C), `bias` is (C,): each output sums over all scales' channels."""
    channels = scales[0].shape[1]
    logits = np.zeros_like(scales[0])
    for o in range(channels):
        logits[:, o] = bias[o]
        for j, z in enumerate(scales):
            for c in range(channels):
                logits[:, o] += weight[o, j * channels + c] * z[:, c]
    return logits


def fusion(scales: list[np.ndarray], weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """`weights` is (|c|, C), `biases` is (|c|,): one score a scale and pixel, softmax over scales."""
    logits = np.zeros_like(scales[0])
    batch, channels, *size = logits.shape
    for b in range(batch):
        for pixel in np.ndindex(*size):
            at = [z[(b, slice(None), *pixel)] for z in scales]
            scores = np.array([w @ value + bias for w, value, bias in zip(weights, at, biases, strict=True)])
            a = np.exp(scores - scores.max())
            a = a / a.sum()
            logits[(b, slice(None), *pixel)] = sum(a_j * value for a_j, value in zip(a, at, strict=True))
    return logits


def map_logits(
    operator: str, scales: list[np.ndarray], parameters: dict[str, np.ndarray], number: int, subset: tuple[int, ...]
) -> np.ndarray:
    """A map from the resampled scales of its subset.

    `parameters` are those of concat and fusion for all of their subsets, `number` the place of this one among them.
    """
    if operator == "original":
        return scales[0]
    if operator in ("concat", "fusion"):
        rows, classes = parameters["weight"][number], scales[0].shape[1]
        columns = [rows[:, j * classes : (j + 1) * classes] for j in subset]
        if operator == "concat":
            return concat(scales, np.concatenate(columns, 1), rows[:, -1])
        own = list(zip(subset, columns, strict=True))
        return fusion(scales, np.stack([weights[j] for j, weights in own]), np.stack([rows[j, -1] for j, _ in own]))
    if operator == "subtract":
        return scales[0] - add(scales[1:])
    if operator == "average":
        return add(scales) / len(scales)
    if operator == "max":
        return np.max(np.stack(scales), 0)
    return {"add": add, "multiply": multiply}[operator](scales)


def log_sum_exp(values: np.ndarray) -> float:
    top = values.max()
    return top + log(sum(np.exp(v - top) for v in values))


def minus_mean_dice(p: np.ndarray, y: np.ndarray, valid: np.ndarray, batch_dice: bool) -> float:
    """-mean Dice of probabilities p against one-hot y, both (B, C, *spatial), over valid (B, *spatial)."""
    batch, classes = p.shape[:2]
    groups = [range(batch)] if batch_dice else [[b] for b in range(batch)]
    dice = []
    for group in groups:
        for c in range(classes):
            both = sum((p[b, c] * y[b, c] * valid[b]).sum() for b in group)
            pred = sum((p[b, c] * valid[b]).sum() for b in group)
            true = sum((y[b, c] * valid[b]).sum() for b in group)
            dice.append((2 * both + SMOOTH) / max(pred + true + SMOOTH, 1e-8))
    return -sum(dice) / len(dice)


def minus_dice_of_the_paper(p: np.ndarray, y: np.ndarray, valid: np.ndarray) -> float:
    """As in the authors' code: denominators of squares, over the batch, and a mean over all classes."""
    dice = []
    for c in range(p.shape[1]):
        both = squares = 0.0
        for b in range(len(p)):
            for pixel in np.ndindex(*valid.shape[1:]):
                if valid[(b, *pixel)]:
                    both += p[(b, c, *pixel)] * y[(b, c, *pixel)]
                    squares += p[(b, c, *pixel)] ** 2 + y[(b, c, *pixel)] ** 2
        dice.append((2 * both + SMOOTH) / (squares + SMOOTH))
    return -sum(dice) / len(dice)


def class_loss(
    z: np.ndarray, target: np.ndarray, *, batch_dice: bool, ignore: int | None = None, paper_dice: bool = False
) -> float:
    """nnU-Net's cross-entropy and Dice without background; `target` is (B, 1, *spatial) of labels."""
    batch, classes, *size = z.shape
    p, y, valid = np.zeros_like(z), np.zeros_like(z), np.zeros((batch, *size))
    entropies = []
    for b in range(batch):
        for pixel in np.ndindex(*size):
            logits, label = z[(b, slice(None), *pixel)], int(target[(b, 0, *pixel)])
            norm = log_sum_exp(logits)
            p[(b, slice(None), *pixel)] = np.exp(logits - norm)
            if label == ignore:
                continue
            valid[(b, *pixel)] = 1
            y[(b, label, *pixel)] = 1
            entropies.append(norm - logits[label])
    cross_entropy = sum(entropies) / len(entropies) if entropies else 0.0
    if paper_dice:
        return cross_entropy + minus_dice_of_the_paper(p, y, valid)
    return cross_entropy + minus_mean_dice(p[:, 1:], y[:, 1:], valid, batch_dice)


def region_loss(
    z: np.ndarray, target: np.ndarray, *, batch_dice: bool, ignore: bool = False, paper_dice: bool = False
) -> float:
    """nnU-Net's binary cross-entropy and Dice; `target` is (B, R [+ 1 of ignored pixels], *spatial)."""
    batch, regions, *size = z.shape
    p, valid, entropies = np.zeros_like(z), np.ones((batch, *size)), []
    for b in range(batch):
        for pixel in np.ndindex(*size):
            if ignore and target[(b, regions, *pixel)]:
                valid[(b, *pixel)] = 0
            for r in range(regions):
                logit, y = z[(b, r, *pixel)], float(target[(b, r, *pixel)])
                p[(b, r, *pixel)] = 1 / (1 + np.exp(-logit))
                if valid[(b, *pixel)]:
                    entropies.append(log_sum_exp(np.array([0.0, logit])) - y * logit)
    # what nnU-Net does: with an ignore channel it divides the sum over all regions by the number of valid
    # *pixels*, without one by the number of values
    count = valid.sum() if ignore else len(entropies)
    cross_entropy = sum(entropies) / max(count, 1e-8)
    y = np.asarray(target[:, :regions], dtype=np.float64)
    if paper_dice:
        return cross_entropy + minus_dice_of_the_paper(p, y, valid)
    return cross_entropy + minus_mean_dice(p, y, valid, batch_dice)


def on_grid(image: np.ndarray, second: tuple[int, ...], stride: int, step: int) -> np.ndarray:
    """The pixels that a step uses of an image (B, C, *spatial); `second` is the size of the second output."""
    strides = [min(stride, fine) if coarse < fine and coarse <= -(-fine // 2) else 1
               for fine, coarse in zip(image.shape[2:], second, strict=True)]  # fmt: skip
    offsets = list(product(*(range(s) for s in strides)))
    offset = offsets[step % len(offsets)]
    return image[(..., *(slice(o, None, s) for o, s in zip(offset, strides, strict=True)))]


def weights_of_maps(rule: str, theta: np.ndarray) -> np.ndarray:
    """Free with the paper's rule, else normalised."""
    relative = {"equal": lambda t: 1.0, "barrier": np.exp, "softplus": lambda t: log(1 + np.exp(t))}[rule]
    v = np.array([relative(t) for t in theta])
    return v if rule == "softplus" else v / sum(v)


def gradient_of_theta(rule: str, theta: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Derivative by theta, losses >= 0, of sum w L (softplus) and of sum w L - log(w) / 2 (barrier)."""
    if rule == "barrier":
        return np.array([np.exp(t) * loss - 0.5 for t, loss in zip(theta, losses, strict=True)])
    slope = [1 / (1 + np.exp(-t)) for t in theta]
    return np.array([a * loss for a, loss in zip(slope, losses, strict=True)])


def example(sizes, *, batch=2, classes=3, regions=False, ignore=False, seed=0):
    """Random logits of the given sizes, finest first, and a target with a quarter of ignored pixels."""
    rng = np.random.default_rng(seed)
    outputs = [rng.normal(0, 1.5, (batch, classes, *size)) for size in sizes]
    shape = (batch, 1, *sizes[0])
    ignored = rng.random(shape) < 0.25
    if regions:
        target = rng.integers(0, 2, (batch, classes, *sizes[0]))
        return outputs, np.concatenate([target, ignored], 1) if ignore else target
    target = rng.integers(0, classes, shape)
    return outputs, np.where(ignored, classes, target) if ignore else target
