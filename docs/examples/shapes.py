"""Generated images for the examples: discs and squares of several sizes, in noise."""

import torch
from torch import Tensor

SIZE = 64
NUM_CLASSES = 3  # background, discs, squares


def make_batch(generator: torch.Generator, samples: int = 4) -> tuple[Tensor, Tensor]:
    """Images ``(samples, 1, 64, 64)``, float32, and their labels of the same shape, int64: 1 discs, 2 squares."""
    labels = torch.zeros(samples, 1, SIZE, SIZE, dtype=torch.int64)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij"))
    for label in labels[:, 0]:
        for number in range(6):
            kind = 1 + number % 2
            centre = SIZE * torch.rand(2, 1, 1, generator=generator)
            radius = 3 + 9 * torch.rand((), generator=generator)
            distance = torch.linalg.vector_norm(grid - centre, ord=2 if kind == 1 else torch.inf, dim=0)
            label[distance < radius] = kind
    return labels + 0.5 * torch.randn(labels.shape, generator=generator), labels


def make_batches(steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """A batch for each step, always the same ones for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [make_batch(generator) for _ in range(steps)]


def dice(logits: Tensor, labels: Tensor) -> float:
    """Dice of the most probable class of each pixel, mean of discs and squares; logits ``(B, 3, 64, 64)``."""
    found = logits.argmax(1, keepdim=True)
    scores = []
    for kind in range(1, NUM_CLASSES):
        overlap = ((found == kind) & (labels == kind)).sum()
        scores.append(2 * overlap / ((found == kind).sum() + (labels == kind).sum()))
    return float(sum(scores) / len(scores))


def print_result(losses: list[float], before: float, after: float) -> None:
    """What a training changed."""
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps (at best -1: cross-entropy - Dice)")
    print(f"Dice {before:.3f} -> {after:.3f} on unseen images")
