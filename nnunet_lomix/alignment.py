"""How much the gradient of each map helps ``z_0``, for the price of a few passes through the network."""

import torch
from torch import Tensor, nn

from nnunet_lomix.backends.base import full_precision
from nnunet_lomix.loss import LoMixLoss

RELATIVE_STEP = 1e-3


def measure_alignment(
    network: nn.Module, loss: LoMixLoss, data: Tensor, target: Tensor, held_out: bool = False, step=RELATIVE_STEP
) -> Tensor:
    """⟨u, ∇L_i⟩ for each map i, with u = ∇L_0 / ‖∇L_0‖ and gradients by the parameters of the network.

    Not one backward pass for each map: the scalar product is the derivative of L_i along u, and a central difference
    gives that of all maps at once, ``(L_i(φ + h u) − L_i(φ − h u)) / 2h``, with two forward passes.

    Args:
        network: gives the outputs that ``loss`` takes. Its parameters are moved and put back exactly, and so are the
            running statistics of its normalisation, if it has any.
        loss: the loss.
        data, target: a batch; the target is at full resolution.
        held_out: ∇L_0 on every other sample of the batch, ∇L_i on those between, if there are two.
        step: length of h u, relative to the length of the parameters.

    Returns:
        ``(len(loss.maps),)``, detached; zero where ∇L_0 is zero or not finite.
    """
    # every other sample, as nnU-Net's last samples of a batch are those with foreground
    apart = held_out and len(data) > 1
    first, second = (slice(0, None, 2), slice(1, None, 2)) if apart else (slice(None), slice(None))
    parameters = [p for p in network.parameters() if p.requires_grad]
    buffers = [(b, b.clone()) for b in network.buffers()]
    with full_precision(data.device.type):
        with torch.enable_grad():
            loss_of_z_0 = loss.losses(network(data[first]), target[first], loss.maps[:1])
            gradients = torch.autograd.grad(loss_of_z_0, parameters, allow_unused=True)
        # outputs other than z_0 have heads of their own, which ∇L_0 doesn't reach
        moved, gradients = zip(
            *((p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None), strict=True
        )
        with torch.no_grad():
            length = norm(gradients)
            usable = length.isfinite() & (length > 0)
            h = step * norm(moved)
            before = [p.clone() for p in moved]
            losses = []
            try:
                for sign in (1, -1):
                    for p, old, g in zip(moved, before, gradients, strict=True):
                        p.copy_(torch.where(usable, old + sign * h / length * g, old))
                    # also where it is of no use: under DDP the other ranks wait for these sums
                    losses.append(loss.losses(network(data[second]), target[second]))
            finally:
                for tensor, old in [*zip(moved, before, strict=True), *buffers]:
                    tensor.copy_(old)
            return torch.where(usable, (losses[0] - losses[1]) / (2 * h), 0.0)


def norm(tensors) -> Tensor:
    """Length of all tensors taken as one vector."""
    return torch.stack([t.norm() for t in tensors]).norm()
