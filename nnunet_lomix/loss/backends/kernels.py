"""The Triton kernels of the fused backend: the whole batch in one launch forward, and few launches backward.

A program is a few warps (one, but for many classes). It takes blocks of pixels of one sample, one after the other. All
scales of a block lie in registers: a tuple of S tensors ``(BC, P)``, classes padded to a power of two by pixels. Every
map is formed from them and is gone before the next one is formed. The maps of an operator follow each other, so each
operator has a loop of its own without the code of the others.

What a program sums over its blocks it keeps in a row of its own in memory, and the rows are added afterwards in a fixed
order. Nothing is added by atomic operations: two runs give the same bits.

A table says which maps there are. It lies in the memory of the device, so that it may be made there:

- ``ranges (5, 2)``: where the maps of each operator begin and end, in the order of the codes below;
- ``subsets (M,)``: a bit for each scale of a map;
- ``offsets (M,)``: where the parameters of a map begin in the row of all parameters: for concat its weight
  ``(C, |c|, C)`` and bias ``(C,)``, for fusion its weight ``(|c|, C)`` and bias ``(|c|,)``.

Positions within a sample fit into 32 bits, the samples are found by 64 bits.
"""

import triton
import triton.language as tl

ORIGINAL, SUM, PRODUCT, CONCAT, FUSION = (tl.constexpr(code) for code in range(5))
OPERATORS = tl.constexpr(5)
SMALLEST_DOT = tl.constexpr(16)  # classes from which a product of matrices goes to the tensor cores


@triton.jit
def _neighbours(position, coarse, fine):
    """The two coarse positions beside a fine one, and how far it lies between them; as F.interpolate has them."""
    centre = tl.maximum((position.to(tl.float32) + 0.5) * (coarse.to(tl.float32) / fine.to(tl.float32)) - 0.5, 0.0)
    low = tl.minimum(centre.to(tl.int32), coarse - 1)
    return low, tl.minimum(low + 1, coarse - 1), centre - low.to(tl.float32)


@triton.jit
def _load_scales(scales, sample, channel, pixel, inside, C, N, S: tl.constexpr):
    """S times (BC, P); 0 outside."""
    loaded = ()
    for j in tl.static_range(S):
        at = sample.to(tl.int64) * C * N + channel * N + pixel[None, :]
        loaded = loaded + (tl.load(scales[j] + at, mask=inside, other=0.0),)
    return loaded


@triton.jit
def _load_target(labels, y, valid, sample, channel, pixel, inside, C, N, REGIONS: tl.constexpr, VALID: tl.constexpr):
    """y (BC, P) of 0 and 1, and what counts, (1, P) of 0 and 1."""
    counts = (pixel < N).to(tl.float32)
    first = sample.to(tl.int64) * N
    if VALID:
        counts = tl.load(valid + first + pixel, mask=pixel < N, other=0.0)
    if REGIONS:
        truth = tl.load(y + first * C + channel * N + pixel[None, :], mask=inside, other=0.0)
    else:
        truth = (channel == tl.load(labels + first + pixel, mask=pixel < N, other=0)[None, :]).to(tl.float32)
    counts = counts[None, :]
    return truth * counts, counts


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
def _count(subset, S: tl.constexpr):
    """The number of scales of a subset."""
    count = subset & 1
    for j in tl.static_range(1, S):
        count += (subset >> j) & 1
    return count


@triton.jit
def _channel_of(z, channel, c):
    """(1, P): one channel of (BC, P)."""
    return tl.sum(tl.where(channel == c, z, 0.0), axis=0)[None, :]


@triton.jit
def _matrix(weight, count, C, BC: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(BC, BC) of a weight (C, |c|, C) that begins at one of its scales, or transposed; padded with 0."""
    row, column = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
    inside = (row < C) & (column < C)
    if TRANSPOSED:
        return tl.load(weight + column * count * C + row, mask=inside, other=0.0)
    else:
        return tl.load(weight + row * count * C + column, mask=inside, other=0.0)


@triton.jit
def _multiply_matrix(weight, count, z, channel, C, BC: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The matrix of :func:`_matrix` times z (BC, P)."""
    if BC >= SMALLEST_DOT:  # three products in TF32 make one that is as good as in single precision
        return tl.dot(_matrix(weight, count, C, BC, TRANSPOSED), z, input_precision="tf32x3")
    else:
        product = tl.zeros_like(z)
        for c in tl.static_range(BC):
            at = c * count * C + channel if TRANSPOSED else channel * count * C + c
            column = tl.load(weight + at, mask=(channel < C) & (c < C), other=0.0)
            product += column * _channel_of(z, channel, c)
        return product


@triton.jit
def _concat(scales, subset, parameters, channel, C, BC: tl.constexpr):
    count = _count(subset, len(scales))
    logits = tl.zeros_like(scales[0]) + tl.load(parameters + count * C * C + channel, mask=channel < C, other=0.0)
    place = 0
    for j in tl.static_range(len(scales)):
        if _has(subset, j):
            logits += _multiply_matrix(parameters + place * C, count, scales[j], channel, C, BC, False)
            place += 1
    return logits


@triton.jit
def _attention(scales, subset, parameters, channel, C):
    """S times (1, P): softmax over the scales of the subset."""
    count = _count(subset, len(scales))
    top = tl.full((1, scales[0].shape[1]), float("-inf"), tl.float32)
    scores = ()
    place = 0
    for j in tl.static_range(len(scales)):
        score = tl.full((1, scales[0].shape[1]), float("-inf"), tl.float32)
        if _has(subset, j):
            weight = tl.load(parameters + place * C + channel, mask=channel < C, other=0.0)
            score = tl.sum(weight * scales[j], axis=0)[None, :] + tl.load(parameters + count * C + place)
            place += 1
        scores = scores + (score,)
        top = tl.maximum(top, score)
    total = tl.zeros_like(top)
    exponentials = ()
    for j in tl.static_range(len(scales)):
        e = tl.exp(scores[j] - top)
        exponentials = exponentials + (e,)
        total += e
    attention = ()
    for j in tl.static_range(len(scales)):
        attention = attention + (exponentials[j] * (1 / total),)
    return attention


@triton.jit
def _weighted_sum(scales, subset, attention):
    logits = tl.zeros_like(scales[0])
    for j in tl.static_range(len(scales)):
        if _has(subset, j):
            logits += attention[j] * scales[j]
    return logits


@triton.jit
def _map(operator: tl.constexpr, scales, subset, parameters, channel, C, BC: tl.constexpr):
    """The logits (BC, P) of a map, and the attention that fusion pays to the scales, S times (1, P)."""
    attention = ()
    if operator == PRODUCT:
        logits = _product(scales, subset)
    elif operator == CONCAT:
        logits = _concat(scales, subset, parameters, channel, C, BC)
    elif operator == FUSION:
        attention = _attention(scales, subset, parameters, channel, C)
        logits = _weighted_sum(scales, subset, attention)
    else:
        logits = _sum(scales, subset)
    return logits, attention


@triton.jit
def _softmax(logits, counts, channel, C):
    """p (BC, P), 0 where a pixel doesn't count, and the logarithm of the sum of exponentials (1, P)."""
    logits = tl.where(channel < C, logits, float("-inf"))
    top = tl.max(logits, axis=0)[None, :]
    e = tl.exp(logits - top)
    total = tl.sum(e, axis=0)[None, :]
    return e * (counts / total), top + tl.log(total)


@triton.jit
def _add(at, values, mask):
    """Add to what the program's row has there."""
    tl.store(at, values + tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _add_sums(row, entropy, intersection, volume, C, BC: tl.constexpr):
    """A row of sums is the cross-entropy, C intersections and C volumes."""
    classes = tl.arange(0, BC)
    _add(row + 1 + classes, intersection, classes < C)
    _add(row + 1 + C + classes, volume, classes < C)
    tl.store(row, entropy + tl.load(row))


# They change from launch to launch, or may be 1, which Triton would take for a constant.
UNSPECIALISED = ["first_sample", "M"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(resampled, first_sample, labels, y, valid, ranges, subsets, offsets, parameters, rows, C, N, M,
                   S: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                   REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Adds to ``rows (B, G, M + 1, 2 C + 1)`` the sums of M maps over the blocks of each of G programs a sample.

    ``resampled`` are the S scales ``(b, C, N)`` of b samples from the first. The last map stands for the target: how
    many pixels count, nothing, and how many are of each class.
    """
    program, local = tl.program_id(0), tl.program_id(1)
    sample = first_sample + local
    channel = tl.arange(0, BC)[:, None]
    row = rows + (local.to(tl.int64) * tl.num_programs(0) + program) * (M + 1) * (2 * C + 1)
    for block in range(program, tl.cdiv(N, P), tl.num_programs(0)):
        pixel = block * P + tl.arange(0, P)
        inside = (channel < C) & (pixel[None, :] < N)
        scales = _load_scales(resampled, local, channel, pixel, inside, C, N, S)
        truth, counts = _load_target(labels, y, valid, sample, channel, pixel, inside, C, N, REGIONS, VALID)
        for operator in tl.static_range(OPERATORS):
            for i in range(tl.load(ranges + 2 * operator), tl.load(ranges + 2 * operator + 1)):
                subset, offset = tl.load(subsets + i), tl.load(offsets + i)
                logits, _ = _map(operator, scales, subset, parameters + offset, channel, C, BC)
                if REGIONS:
                    e = tl.exp(-tl.abs(logits))
                    p = tl.where(logits < 0, e, 1.0) / (1 + e) * counts
                    entropy = tl.maximum(logits, 0.0) * counts - logits * truth + tl.log(1 + e) * counts
                    entropy = tl.where(channel < C, entropy, 0.0)
                else:
                    p, log_sum = _softmax(logits, counts, channel, C)
                    entropy = (log_sum - logits) * truth
                entropy = tl.sum(tl.sum(entropy, axis=0), axis=0)
                _add_sums(row + i * (2 * C + 1), entropy, tl.sum(p * truth, axis=1), tl.sum(p, axis=1), C, BC)
        volume = tl.sum(truth, axis=1)
        number = tl.sum(tl.sum(counts, axis=0), axis=0)
        _add_sums(row + M * (2 * C + 1), number, tl.zeros_like(volume), volume, C, BC)
        tl.debug_barrier()  # the next block adds to what other lanes have written


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_kernel(resampled, first_sample, labels, y, valid, ranges, subsets, offsets, parameters, grad_sums,
                    grad_z_0, grad_parameters, C, N, M, NUMBER,
                    S: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                    REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes the gradients by the scales: that of ``z_0`` where it belongs, the others in place of the scales.

    And adds the gradients by the NUMBER parameters to ``grad_parameters (b, G, NUMBER)``, a row for each program.
    ``grad_sums (B, M, 2 C + 1)`` is the gradient by the sums of the forward kernel.
    """
    program, local = tl.program_id(0), tl.program_id(1)
    sample = first_sample + local
    channel = tl.arange(0, BC)[:, None]
    row = grad_parameters + (local.to(tl.int64) * tl.num_programs(0) + program) * NUMBER
    for block in range(program, tl.cdiv(N, P), tl.num_programs(0)):
        pixel = block * P + tl.arange(0, P)
        inside = (channel < C) & (pixel[None, :] < N)
        scales = _load_scales(resampled, local, channel, pixel, inside, C, N, S)
        truth, counts = _load_target(labels, y, valid, sample, channel, pixel, inside, C, N, REGIONS, VALID)
        totals = ()
        for j in tl.static_range(S):
            totals = totals + (tl.zeros_like(scales[j]),)
        for operator in tl.static_range(OPERATORS):
            for i in range(tl.load(ranges + 2 * operator), tl.load(ranges + 2 * operator + 1)):
                subset, offset = tl.load(subsets + i), tl.load(offsets + i)
                logits, attention = _map(operator, scales, subset, parameters + offset, channel, C, BC)

                # the gradient by the logits of the map: as Criterion.pixel_sums_vjp
                grads = grad_sums + (sample * M + i) * (2 * C + 1)
                grad_entropy = tl.load(grads)
                grad_intersection = tl.load(grads + 1 + channel, mask=channel < C, other=0.0)
                grad_volume = tl.load(grads + 1 + C + channel, mask=channel < C, other=0.0)
                grad_p = grad_volume + truth * grad_intersection
                if REGIONS:
                    p = 1 / (1 + tl.exp(-logits))
                    grad = (grad_p * p * (1 - p) + grad_entropy * (p - truth)) * counts
                    grad = tl.where(channel < C, grad, 0.0)
                else:
                    p, _ = _softmax(logits, counts, channel, C)
                    grad = p * (grad_p + (grad_entropy - tl.sum(grad_p * p, axis=0)[None, :])) - grad_entropy * truth

                if operator == PRODUCT:
                    totals = _product_vjp(totals, grad, scales, subset)
                elif operator == CONCAT:
                    tl.debug_barrier()  # a map that is drawn twice adds to what other lanes have written
                    totals = _concat_vjp(totals, grad, scales, subset, parameters + offset, row + offset,
                                         channel, C, BC)  # fmt: skip
                elif operator == FUSION:
                    tl.debug_barrier()
                    totals = _fusion_vjp(totals, grad, logits, scales, subset, attention, parameters + offset,
                                         row + offset, channel, C, BC)  # fmt: skip
                else:
                    totals = _sum_vjp(totals, grad, subset)
        at = local.to(tl.int64) * C * N + channel * N + pixel[None, :]
        tl.store(grad_z_0 + at, totals[0], mask=inside)
        for j in tl.static_range(1, S):
            tl.store(resampled[j] + at, totals[j], mask=inside)
        tl.debug_barrier()  # the next block adds to what other lanes have written


@triton.jit
def _sum_vjp(totals, grad, subset):
    """The totals of the scales with the gradient by a map added."""
    added = ()
    for j in tl.static_range(len(totals)):
        total = totals[j]
        if _has(subset, j):
            total += grad
        added = added + (total,)
    return added


@triton.jit
def _product_vjp(totals, grad, scales, subset):
    """The same for a product: each scale gets the product of those before it and of those after it."""
    before, product = (), tl.zeros_like(grad) + 1
    for j in tl.static_range(len(scales)):
        before = before + (product,)
        if _has(subset, j):
            product *= scales[j]
    added, after = (), grad
    for j in tl.static_range(len(scales) - 1, -1, -1):
        total = totals[j]
        if _has(subset, j):
            total += after * before[j]
            after *= scales[j]
        added = (total,) + added
    return added


@triton.jit
def _concat_vjp(totals, grad, scales, subset, parameters, row, channel, C, BC: tl.constexpr):
    """The same for a convolution, whose parameters have their gradients added to the program's row."""
    count = _count(subset, len(scales))
    _add(row + count * C * C + tl.arange(0, BC), tl.sum(grad, axis=1), tl.arange(0, BC) < C)
    added = ()
    place = 0
    for j in tl.static_range(len(scales)):
        total = totals[j]
        if _has(subset, j):
            total += _multiply_matrix(parameters + place * C, count, grad, channel, C, BC, True)
            _add_outer_product(row + place * C, grad, scales[j], count, channel, C, BC)
            place += 1
        added = added + (total,)
    return added


@triton.jit
def _add_outer_product(at, grad, z, count, channel, C, BC: tl.constexpr):
    """Σ over pixels of grad (BC, P) times z (BC, P), each channel by each, added to a weight (C, |c|, C)."""
    if BC >= SMALLEST_DOT:
        row, column = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
        product = tl.dot(grad, tl.trans(z), input_precision="tf32x3")
        _add(at + row * count * C + column, product, (row < C) & (column < C))
    else:
        row = tl.arange(0, BC)
        for c in tl.static_range(BC):
            column = tl.sum(grad * _channel_of(z, channel, c), axis=1)
            _add(at + row * count * C + c, column, (row < C) & (c < C))


@triton.jit
def _fusion_vjp(totals, grad, logits, scales, subset, attention, parameters, row, channel, C,
                BC: tl.constexpr):  # fmt: skip
    """The same for a sum that is weighted by attention."""
    count = _count(subset, len(scales))
    classes = tl.arange(0, BC)
    mean = tl.sum(grad * logits, axis=0)[None, :]  # Σ over scales of attention times its gradient
    added = ()
    place = 0
    for j in tl.static_range(len(scales)):
        total = totals[j]
        if _has(subset, j):
            grad_score = attention[j] * (tl.sum(grad * scales[j], axis=0)[None, :] - mean)
            weight = tl.load(parameters + place * C + channel, mask=channel < C, other=0.0)
            total += attention[j] * grad + weight * grad_score
            _add(row + place * C + classes, tl.sum(grad_score * scales[j], axis=1), classes < C)
            bias = row + count * C + place
            tl.store(bias, tl.load(bias) + tl.sum(tl.sum(grad_score, axis=0), axis=0))
            place += 1
        added = added + (total,)
    return added


@triton.jit(do_not_specialize=["coarse", "fine", "inner", "number", "SPAN"])
def adjoint_kernel(grad_fine, grad_coarse, coarse, fine, inner, number, SPAN, P: tl.constexpr):
    """The adjoint of the interpolation along one axis: ``(outer, coarse, inner)`` from ``(outer, fine, inner)``.

    Each of the ``number`` coarse values collects from the fine ones that it is a neighbour of, at most SPAN.
    """
    value = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    inside = value < number
    position = ((value // inner) % coarse).to(tl.int32)
    at = (value // inner // coarse) * fine * inner + value % inner
    ratio = fine.to(tl.float32) / coarse.to(tl.float32)
    start = tl.maximum(tl.floor((position.to(tl.float32) - 0.5) * ratio - 0.5).to(tl.int32), 0)
    total = tl.zeros((P,), tl.float32)
    for k in range(SPAN):
        x = start + k
        low, high, part = _neighbours(x, coarse, fine)
        share = tl.where(low == position, 1 - part, 0.0) + tl.where(high == position, part, 0.0)
        total += share * tl.load(grad_fine + at + x * inner, mask=inside & (x < fine), other=0.0)
    tl.store(grad_coarse + value, total, mask=inside)
