"""The Triton kernels of the fused backend. A program is one warp, and takes a block of pixels of one sample.

All scales of the block lie in registers: a tuple of S tensors ``(BC, P)``, classes padded to a power of two by pixels.
Every map is formed from them and is gone before the next one is formed. The maps of an operator follow each other, as
in the banks of the lean backend, so each operator has a loop of its own without the code of the others. Maps by concat
are the exception: they come from a matrix product, here without the bias, and their gradients go into one.

Where there is no GPU, the tests run them by Triton's interpreter, and compile them for GPUs.
"""

import triton
import triton.language as tl

ORIGINAL, SUM, PRODUCT, CONCAT, FUSION = (tl.constexpr(code) for code in range(5))
OPERATORS = tl.constexpr(5)


@triton.jit
def _load_scales(z, at, inside, C, N, S: tl.constexpr):
    """S times (BC, P) of z (S, C, N); 0 outside."""
    scales = ()
    for j in tl.static_range(S):
        scales = scales + (tl.load(z + j * C * N + at, mask=inside, other=0.0),)
    return scales


@triton.jit
def _load_target(labels, y, valid, channel, pixels, at, inside, N, REGIONS: tl.constexpr, VALID: tl.constexpr):
    """y (BC, P) of 0 and 1, valid (P,) of 0 and 1."""
    counts = (pixels < N).to(tl.float32)
    if VALID:
        counts = tl.load(valid + pixels, mask=pixels < N, other=0.0)
    if REGIONS:
        truth = tl.load(y + at, mask=inside, other=0.0)
    else:
        truth = (channel == tl.load(labels + pixels, mask=pixels < N, other=0)[None, :]).to(tl.float32)
    return truth * counts[None, :], counts


@triton.jit
def _has(subset, j):
    return ((subset >> j) & 1) == 1


@triton.jit
def _sum(scales, subset):
    logits = tl.zeros_like(scales[0])
    for j in tl.static_range(len(scales)):
        if _has(subset, j):
            logits += scales[j]
    return logits


@triton.jit
def _product(scales, subset):
    logits = tl.zeros_like(scales[0]) + 1
    for j in tl.static_range(len(scales)):
        if _has(subset, j):
            logits *= scales[j]
    return logits


@triton.jit
def _weight(fusion_w, row, rows, j, channel, C):
    """(BC, 1) of weight (S, rows, C), padded with 0."""
    return tl.load(fusion_w + (j * rows + row) * C + channel, mask=channel < C, other=0.0)


@triton.jit
def _attention(scales, subset, fusion_w, fusion_b, row, rows, channel, C):
    """S times (P,): softmax over the scales of the subset."""
    top = tl.full((scales[0].shape[1],), float("-inf"), tl.float32)
    scores, exponentials, attention = (), (), ()
    for j in tl.static_range(len(scales)):
        score = tl.full((scales[0].shape[1],), float("-inf"), tl.float32)
        if _has(subset, j):
            weight = _weight(fusion_w, row, rows, j, channel, C)
            score = tl.sum(weight * scales[j], axis=0) + tl.load(fusion_b + j * rows + row)
        scores = scores + (score,)
        top = tl.maximum(top, score)
    total = tl.zeros_like(top)
    for j in tl.static_range(len(scales)):
        e = tl.exp(scores[j] - top)
        exponentials = exponentials + (e,)
        total += e
    for j in tl.static_range(len(scales)):
        attention = attention + (exponentials[j] * (1 / total),)
    return attention


@triton.jit
def _weighted_sum(scales, subset, attention):
    logits = tl.zeros_like(scales[0])
    for j in tl.static_range(len(scales)):
        if _has(subset, j):
            logits += attention[j][None, :] * scales[j]
    return logits


@triton.jit
def _map(operator: tl.constexpr, scales, subset, concats, concat_b, row, rows, fusion_w, fusion_b,
         channel, at, inside, C, N):  # fmt: skip
    """A map (BC, P), and the attention that fusion pays to the scales, S times (P,)."""
    attention = ()
    if operator == PRODUCT:
        logits = _product(scales, subset)
    elif operator == CONCAT:
        logits = tl.load(concats + row * C * N + at, mask=inside, other=0.0)
        logits += tl.load(concat_b + row * C + channel, mask=channel < C, other=0.0)
    elif operator == FUSION:
        attention = _attention(scales, subset, fusion_w, fusion_b, row, rows, channel, C)
        logits = _weighted_sum(scales, subset, attention)
    else:
        logits = _sum(scales, subset)
    return logits, attention


@triton.jit
def _softmax(logits, counts, channel, C):
    """p (BC, P), 0 where a pixel doesn't count, and the logarithm of the sum of exponentials (P,)."""
    logits = tl.where(channel < C, logits, float("-inf"))
    top = tl.max(logits, axis=0)
    e = tl.exp(logits - top[None, :])
    total = tl.sum(e, axis=0)
    return e * (counts / total)[None, :], top + tl.log(total)


@triton.jit
def _sum_of_all(values):
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def forward_kernel(z, concats, concat_b, labels, y, valid, ranges, subsets, fusion_w, fusion_b,
                      cross_entropy, intersection, volume,
                      C, N, S: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                      REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Adds the sums over the block to cross_entropy (M,), intersection and volume (M, C).

    The order in which blocks add doesn't matter, so additions are relaxed: else each one would empty the cache.
    ``ranges (5, 2)`` says where the maps of each operator begin and end, ``subsets (M,)`` has a bit for each scale.
    """
    pixels, channel = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, BC)[:, None]
    at, inside = channel * N + pixels[None, :], (channel < C) & (pixels[None, :] < N)
    scales = _load_scales(z, at, inside, C, N, S)
    truth, counts = _load_target(labels, y, valid, channel, pixels, at, inside, N, REGIONS, VALID)
    classes = tl.arange(0, BC)
    for operator in tl.static_range(OPERATORS):
        first, end = tl.load(ranges + 2 * operator), tl.load(ranges + 2 * operator + 1)
        for i in range(first, end):
            subset = tl.load(subsets + i)
            logits, attention = _map(operator, scales, subset, concats, concat_b, i - first, end - first,
                                     fusion_w, fusion_b, channel, at, inside, C, N)  # fmt: skip
            if REGIONS:
                e = tl.exp(-tl.abs(logits))
                p = tl.where(logits < 0, e, 1.0) / (1 + e) * counts[None, :]
                entropy = tl.maximum(logits, 0.0) * counts[None, :] - logits * truth + tl.log(1 + e) * counts[None, :]
                entropy = _sum_of_all(tl.where(channel < C, entropy, 0.0))
            else:
                p, log_sum = _softmax(logits, counts, channel, C)
                entropy = _sum_of_all((log_sum[None, :] - logits) * truth)
            tl.atomic_add(cross_entropy + i, entropy, sem="relaxed")
            tl.atomic_add(intersection + i * C + classes, tl.sum(p * truth, axis=1), mask=classes < C, sem="relaxed")
            tl.atomic_add(volume + i * C + classes, tl.sum(p, axis=1), mask=classes < C, sem="relaxed")


@triton.jit
def backward_kernel(z, concats, concat_b, labels, y, valid, ranges, subsets, fusion_w, fusion_b,
                    grad_cross_entropy, grad_intersection, grad_volume, grad_z, grad_fusion_w, grad_fusion_b,
                    C, N, S: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                    REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes grad_z (S, C, N), adds to the gradients of fusion, and puts that by each map of concat in its place."""
    pixels, channel = tl.program_id(0) * P + tl.arange(0, P), tl.arange(0, BC)[:, None]
    at, inside = channel * N + pixels[None, :], (channel < C) & (pixels[None, :] < N)
    scales = _load_scales(z, at, inside, C, N, S)
    truth, counts = _load_target(labels, y, valid, channel, pixels, at, inside, N, REGIONS, VALID)
    totals = ()
    for j in tl.static_range(S):
        totals = totals + (tl.zeros_like(scales[j]),)
    for operator in tl.static_range(OPERATORS):
        first, end = tl.load(ranges + 2 * operator), tl.load(ranges + 2 * operator + 1)
        for i in range(first, end):
            subset, row, rows = tl.load(subsets + i), i - first, end - first
            logits, attention = _map(operator, scales, subset, concats, concat_b, row, rows, fusion_w, fusion_b,
                                     channel, at, inside, C, N)  # fmt: skip

            # the gradient by the logits of the map, (BC, P): as Criterion.pixel_sums_vjp
            grad_entropy = tl.load(grad_cross_entropy + i)
            grad_of_truth = tl.load(grad_intersection + i * C + channel, mask=channel < C, other=0.0)
            a = tl.load(grad_volume + i * C + channel, mask=channel < C, other=0.0) + truth * grad_of_truth
            if REGIONS:
                p = 1 / (1 + tl.exp(-logits))
                grad_logits = (a * p * (1 - p) + grad_entropy * (p - truth)) * counts[None, :]
                grad_logits = tl.where(channel < C, grad_logits, 0.0)
            else:
                p, log_sum = _softmax(logits, counts, channel, C)
                grad_logits = p * (a + (grad_entropy - tl.sum(a * p, axis=0))[None, :]) - grad_entropy * truth

            if operator == CONCAT:
                tl.store(concats + row * C * N + at, grad_logits, mask=inside)
            elif operator == PRODUCT:
                totals = _product_vjp(totals, grad_logits, scales, subset)
            else:
                totals = _sum_or_fusion_vjp(operator, totals, grad_logits, logits, scales, subset, attention, row, rows,
                                            fusion_w, grad_fusion_w, grad_fusion_b, channel, C)  # fmt: skip
    for j in tl.static_range(S):
        tl.store(grad_z + j * C * N + at, totals[j], mask=inside)


@triton.jit
def _sum_or_fusion_vjp(operator: tl.constexpr, totals, grad_logits, logits, scales, subset, attention, row, rows,
                       fusion_w, grad_fusion_w, grad_fusion_b, channel, C):  # fmt: skip
    """The totals of the scales with the gradient by a map carried back to them: as the banks of the lean backend."""
    if operator == FUSION:
        mean = tl.sum(grad_logits * logits, axis=0)  # Σ over scales of attention times what it is multiplied with
    carried = ()
    for j in tl.static_range(len(scales)):
        total = totals[j]
        if _has(subset, j):
            if operator == FUSION:
                grad_score = attention[j] * (tl.sum(grad_logits * scales[j], axis=0) - mean)
                total += attention[j][None, :] * grad_logits
                total += _weight(fusion_w, row, rows, j, channel, C) * grad_score[None, :]
                grad_weight = tl.sum(grad_score[None, :] * scales[j], axis=1, keep_dims=True)
                at_weight = grad_fusion_w + (j * rows + row) * C + channel
                tl.atomic_add(at_weight, grad_weight, mask=channel < C, sem="relaxed")
                tl.atomic_add(grad_fusion_b + j * rows + row, tl.sum(grad_score, axis=0), sem="relaxed")
            else:
                total += grad_logits
        carried = carried + (total,)
    return carried


@triton.jit
def _product_vjp(totals, grad_logits, scales, subset):
    """The same for a product: each scale gets the product of those before it and of those after it."""
    before, product = (), tl.zeros_like(grad_logits) + 1
    for j in tl.static_range(len(scales)):
        before = before + (product,)
        if _has(subset, j):
            product *= scales[j]
    carried, after = (), grad_logits
    for j in tl.static_range(len(scales) - 1, -1, -1):
        total = totals[j]
        if _has(subset, j):
            total += after * before[j]
            after *= scales[j]
        carried = (total,) + carried
    return carried
