"""The Triton kernels of the fused backend: one launch forward, one backward, for all maps of a slab of pixels.

They have no parameters. What is linear in the scales, the convolutions of concat and the scores of fusion, is an input,
``linear (B, L, N)``: for each map of concat C rows, its logits; for each map of fusion a row for each scale of its
subset, the scores. The other inputs are the scales, ``z (B, S, C, N)``, of which the first K are mixed, and the target.
Positions within a scale fit into 32 bits, scales and samples are found by 64 bits.

A program is one warp, which takes blocks of pixels, ``(BC, P)``: classes padded to a power of two, by pixels. Forward
a program computes the sums of one map. Backward it treats all maps of a block, since their gradients by the scales add
up. Nothing is added by atomic operations: two runs give the same bits.

``table (M, 4)`` says which maps there are, those of an operator beside each other in the order of the codes below, and
``ends (5,)`` where those of each operator end. A row has the code; the subset, a bit for each scale, or the index of an
output that isn't mixed; the first row in ``linear``; and the number of the map among the sums.
"""

import triton
import triton.language as tl

SUM, PRODUCT, FUSION, CONCAT, UNMIXED = (tl.constexpr(code) for code in range(5))

# Numbers of which the compiled code shall not depend: one code serves all sizes, and 1 isn't taken for a constant.
NUMBERS = ["C", "N", "S", "L", "M"]


@triton.jit
def _has(subset, j):
    return ((subset >> j) & 1) == 1


@triton.jit
def _load_target(labels, y, valid, sample, channel, pixel, C, N, REGIONS: tl.constexpr, VALID: tl.constexpr):
    """y (BC, P) of 0 and 1, and what counts, (1, P) of 0 and 1."""
    counts = (pixel < N).to(tl.float32)
    first = sample.to(tl.int64) * N
    if VALID:
        counts = tl.load(valid + first + pixel, mask=pixel < N, other=0.0)
    if REGIONS:
        truth = tl.load(y + first * C + channel * N + pixel, mask=(channel < C) & (pixel < N), other=0.0)
    else:
        truth = (channel == tl.load(labels + first + pixel, mask=pixel < N, other=0)).to(tl.float32)
    return truth * counts, counts


@triton.jit
def _softmax(logits, counts, channel, C):
    """p (BC, P), 0 where a pixel doesn't count; the logits less their maximum; and log Σ exp of these, (1, P)."""
    logits = tl.where(channel < C, logits, float("-inf"))
    logits = logits - tl.max(logits, axis=0)[None, :]
    e = tl.exp(logits)
    total = tl.sum(e, axis=0)[None, :]
    return e * (counts / total), logits, tl.log(total)


@triton.jit
def _load_scales(z, subset, channel, pixel, C, N, K: tl.constexpr):
    """K times (BC, P): the scales of a subset; 0 in place of the others, and outside."""
    scales = ()
    for j in tl.static_range(K):
        scale = tl.zeros((channel.shape[0], pixel.shape[1]), tl.float32)
        if _has(subset, j):
            scale = _load_scale(z, j, channel, pixel, C, N)
        scales = scales + (scale,)
    return scales


@triton.jit
def _load_scale(z, j, channel, pixel, C, N):
    at = z + (C * N).to(tl.int64) * j + channel * N + pixel
    return tl.load(at, mask=(channel < C) & (pixel < N), other=0.0)


@triton.jit
def _load_score(linear, row, has, pixel, N):
    """(1, P): a score; −∞ if the subset doesn't have the scale."""
    return tl.where(has, tl.load(linear + row * N + pixel, mask=(pixel < N) & has, other=0.0), float("-inf"))


@triton.jit
def _attention(linear, subset, pixel, N, K: tl.constexpr):
    """K times (1, P): the softmax over the scales of a subset of their scores."""
    top = tl.full(pixel.shape, float("-inf"), tl.float32)
    scores = ()
    row = tl.zeros((), tl.int32)
    for j in tl.static_range(K):
        score = _load_score(linear, row, _has(subset, j), pixel, N)
        scores = scores + (score,)
        top = tl.maximum(top, score)
        row += _has(subset, j).to(tl.int32)
    total = tl.zeros(pixel.shape, tl.float32)
    exponentials = ()
    for j in tl.static_range(K):
        e = tl.exp(scores[j] - top)
        exponentials = exponentials + (e,)
        total += e
    attention = ()
    for j in tl.static_range(K):
        attention = attention + (exponentials[j] * (1 / total),)
    return attention


@triton.jit
def _logits(OPERATOR: tl.constexpr, scales, z, linear, subset, channel, pixel, C, N):
    """The logits (BC, P) of a map, and the attention that fusion pays to the scales; ``linear`` begins at its rows."""
    attention = ()
    if OPERATOR == CONCAT:
        logits = tl.load(linear + channel * N + pixel, mask=(channel < C) & (pixel < N), other=0.0)
    elif OPERATOR == UNMIXED:
        logits = _load_scale(z, subset, channel, pixel, C, N)
    else:
        logits = tl.full((channel.shape[0], pixel.shape[1]), 1.0 if OPERATOR == PRODUCT else 0.0, tl.float32)
        if OPERATOR == FUSION:
            attention = _attention(linear, subset, pixel, N, len(scales))
        for j in tl.static_range(len(scales)):
            if _has(subset, j):
                if OPERATOR == SUM:
                    logits += scales[j]
                elif OPERATOR == PRODUCT:
                    logits *= scales[j]
                else:
                    logits += attention[j] * scales[j]
    return logits, attention


@triton.jit
def _add_up(OPERATOR: tl.constexpr, z, linear, labels, y, valid, row, subset, sample, C, N,
            K: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
            REGIONS: tl.constexpr, SQUARED: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes the sums of a map over the blocks of a program to its ``row``."""
    channel = tl.arange(0, BC)[:, None]
    entropies = tl.zeros((1, P), tl.float32)
    intersections, volumes = tl.zeros((BC, P), tl.float32), tl.zeros((BC, P), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(N, P), tl.num_programs(1)):
        pixel = (block * P + tl.arange(0, P))[None, :]
        truth, counts = _load_target(labels, y, valid, sample, channel, pixel, C, N, REGIONS, VALID)
        scales = ()
        if OPERATOR < CONCAT:
            scales = _load_scales(z, subset, channel, pixel, C, N, K)
        logits, _ = _logits(OPERATOR, scales, z, linear, subset, channel, pixel, C, N)
        if REGIONS:
            e = tl.exp(-tl.abs(logits))
            p = tl.where(logits < 0, e, 1.0) / (1 + e) * counts
            # in this order: of a sure region the first two are equal, and the third is all there is
            entropy = tl.maximum(logits, 0.0) * counts - logits * truth + tl.log(1 + e) * counts
            entropies += tl.sum(tl.where(channel < C, entropy, 0.0), axis=0)[None, :]
        else:
            p, shifted, log_total = _softmax(logits, counts, channel, C)
            of_true_class = tl.sum(tl.where(truth > 0, shifted, 0.0), axis=0)[None, :]
            entropies += log_total * counts - of_true_class
        intersections += p * truth
        volumes += p * p if SQUARED else p
    classes = tl.arange(0, BC)
    tl.store(row, tl.sum(tl.sum(entropies, axis=1), axis=0))
    tl.store(row + 1 + classes, tl.sum(intersections, axis=1), mask=classes < C)
    tl.store(row + 1 + C + classes, tl.sum(volumes, axis=1), mask=classes < C)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(z, linear, labels, y, valid, table, sums, C, N, S, L, M,
                   K: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                   REGIONS: tl.constexpr, SQUARED: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes ``sums (G, M, B, 1 + 2 C)``, those of one map, over each G-th block of pixels of one sample."""
    place, part, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    code, subset = tl.load(table + 4 * place), tl.load(table + 4 * place + 1)
    first, number = tl.load(table + 4 * place + 2), tl.load(table + 4 * place + 3)
    z += sample.to(tl.int64) * S * C * N
    linear += (sample.to(tl.int64) * L + first) * N
    row = sums + ((part * M + number) * tl.num_programs(2) + sample).to(tl.int64) * (1 + 2 * C)
    for operator in tl.static_range(5):
        if code == operator:
            _add_up(operator, z, linear, labels, y, valid, row, subset, sample, C, N, K, BC, P, REGIONS, SQUARED, VALID)


@triton.jit
def _gradient(logits, grad_sums, truth, counts, channel, C, REGIONS: tl.constexpr, SQUARED: tl.constexpr):
    """The gradient by the logits of a map from the gradient by its sums, ``(1 + 2 C)``."""
    grad_entropy = tl.load(grad_sums)
    grad_intersection = tl.load(grad_sums + 1 + channel, mask=channel < C, other=0.0)
    grad_volume = tl.load(grad_sums + 1 + C + channel, mask=channel < C, other=0.0)
    if REGIONS:
        p = 1 / (1 + tl.exp(-logits))
    else:
        p, _, _ = _softmax(logits, counts, channel, C)
    if SQUARED:
        grad_volume *= 2 * p
    grad_p = grad_volume + truth * grad_intersection
    if REGIONS:
        return tl.where(channel < C, (grad_p * p * (1 - p) + grad_entropy * (p - truth)) * counts, 0.0)
    else:
        return p * (grad_p + (grad_entropy - tl.sum(grad_p * p, axis=0)[None, :])) - grad_entropy * truth


@triton.jit
def _carry_back(OPERATOR: tl.constexpr, totals, grad, logits, attention, scales, linear, subset, pixel, N):
    """The totals of the scales with the gradient by a sum, a product or a fusion added; scores get theirs."""
    added = ()
    row = tl.zeros((), tl.int32)
    for j in tl.static_range(len(scales)):
        total = totals[j]
        if _has(subset, j):
            if OPERATOR == SUM:
                total += grad
            elif OPERATOR == PRODUCT:
                product = grad
                for k in tl.static_range(len(scales)):
                    if (k != j) & _has(subset, k):
                        product *= scales[k]
                total += product
            else:
                total += attention[j] * grad
                # Σ over scales of attention times its gradient is Σ over classes of grad times logits
                grad_score = attention[j] * tl.sum(grad * (scales[j] - logits), axis=0)[None, :]
                tl.store(linear + row * N + pixel, grad_score, mask=pixel < N)
                row += 1
        added = added + (total,)
    return added


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(z, linear, labels, y, valid, table, ends, grad_sums, grad_z, C, N, S, L, M,
                    K: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
                    REGIONS: tl.constexpr, SQUARED: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes ``grad_z``, the gradient by ``z``, and that by ``linear`` in its place, of one block of one sample.

    Of ``grad_z`` this is what doesn't go through ``linear``. ``grad_sums (M, B, 1 + 2 C)`` is the gradient by the sums.
    """
    sample = tl.program_id(1)
    z += sample.to(tl.int64) * S * C * N
    grad_z += sample.to(tl.int64) * S * C * N
    linear += sample.to(tl.int64) * L * N
    channel = tl.arange(0, BC)[:, None]
    pixel = (tl.program_id(0) * P + tl.arange(0, P))[None, :]
    inside = (channel < C) & (pixel < N)
    at = channel * N + pixel
    truth, counts = _load_target(labels, y, valid, sample, channel, pixel, C, N, REGIONS, VALID)
    scales = _load_scales(z, -1, channel, pixel, C, N, K)
    totals = ()
    for _ in tl.static_range(K):
        totals = totals + (tl.zeros((BC, P), tl.float32),)
    begin = 0
    for operator in tl.static_range(5):
        end = tl.load(ends + operator)
        for i in range(begin, end):
            subset, number = tl.load(table + 4 * i + 1), tl.load(table + 4 * i + 3)
            rows = linear + tl.load(table + 4 * i + 2).to(tl.int64) * N
            logits, attention = _logits(operator, scales, z, rows, subset, channel, pixel, C, N)
            of_map = grad_sums + (number * tl.num_programs(1) + sample) * (1 + 2 * C)
            grad = _gradient(logits, of_map, truth, counts, channel, C, REGIONS, SQUARED)
            if operator == CONCAT:
                tl.store(rows + at, grad, mask=inside)
            elif operator == UNMIXED:
                tl.store(grad_z + (C * N).to(tl.int64) * subset + at, grad, mask=inside)
            else:
                totals = _carry_back(operator, totals, grad, logits, attention, scales, rows, subset, pixel, N)
        begin = end
    for j in tl.static_range(K):
        tl.store(grad_z + (C * N).to(tl.int64) * j + at, totals[j], mask=inside)
