"""The Triton kernels of the fused backend. One program takes a block of P pixels of one sample, with all its scales.

The block z of the scales is ``(SP, BC, P)``: number of scales and of classes, padded to powers of two. Every map is
formed from it by the bits of its subset, without a branch for each scale, and is gone before the next one is formed.

No GPU has run these kernels yet; the tests run them by Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _load_scales(z, sample, pixels, B, C, N, S, SP: tl.constexpr, BC: tl.constexpr):
    """(SP, BC, P) of z (S, B, C, N); 0 outside."""
    scale, channel, pixel = tl.arange(0, SP)[:, None, None], tl.arange(0, BC)[None, :, None], pixels[None, None, :]
    inside = (scale < S) & (channel < C) & (pixel < N)
    return tl.load(z + ((scale * B + sample) * C + channel) * N + pixel, mask=inside, other=0.0)


@triton.jit
def _load_truth(labels, y, valid, sample, pixels, C, N, BC: tl.constexpr, REGIONS: tl.constexpr, VALID: tl.constexpr):
    """y (BC, P) of 0 and 1, valid (P,) of 0 and 1."""
    channel = tl.arange(0, BC)[:, None]
    inside = pixels < N
    counts = inside.to(tl.float32)
    if VALID:
        counts = tl.load(valid + sample * N + pixels, mask=inside, other=0.0)
    if REGIONS:
        both = (channel < C) & inside[None, :]
        truth = tl.load(y + (sample * C + channel) * N + pixels[None, :], mask=both, other=0.0)
    else:
        truth = (channel == tl.load(labels + sample * N + pixels, mask=inside, other=0)[None, :]).to(tl.float32)
    return truth * counts[None, :], counts


@triton.jit
def _concat_weight(weight, row, C, S, SP: tl.constexpr, BC: tl.constexpr):
    """(BC, SP · BC) of weight (R, C, S, C), padded with 0."""
    out, column = tl.arange(0, BC)[:, None], tl.arange(0, SP * BC)[None, :]
    scale, channel = column // BC, column % BC
    inside = (out < C) & (scale < S) & (channel < C)
    return tl.load(weight + ((row * C + out) * S + scale) * C + channel, mask=inside, other=0.0)


@triton.jit
def _fusion_weight(weight, row, C, S, SP: tl.constexpr, BC: tl.constexpr):
    """(SP, BC) of weight (R, S, C), padded with 0."""
    scale, channel = tl.arange(0, SP)[:, None], tl.arange(0, BC)[None, :]
    return tl.load(weight + (row * S + scale) * C + channel, mask=(scale < S) & (channel < C), other=0.0)


@triton.jit
def _attention(z, bits, weight, bias, row, C, S, SP: tl.constexpr, BC: tl.constexpr):
    """a (SP, P): softmax over the scales of the subset."""
    scale = tl.arange(0, SP)
    scores = tl.sum(_fusion_weight(weight, row, C, S, SP, BC)[:, :, None] * z, axis=1)
    scores += tl.load(bias + row * S + scale, mask=scale < S, other=0.0)[:, None]
    scores = tl.where(bits[:, None], scores, float("-inf"))
    e = tl.exp(scores - tl.max(scores, axis=0)[None, :])
    return e / tl.sum(e, axis=0)[None, :]


@triton.jit
def _mix(z, operator, bits, row, concat_w, concat_b, fusion_w, fusion_b, C, S,
         SP: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """A map (BC, P). Operators as numbered in fused.CODES; an original is a sum of one scale."""
    chosen = bits[:, None, None]
    if operator == 0:
        mixed = tl.sum(tl.where(chosen, z, 0.0), axis=0)
    elif operator == 1:
        mixed = tl.reduce(tl.where(chosen, z, 1.0), 0, _product)
    elif operator == 2:
        channel = tl.arange(0, BC)
        weight = _concat_weight(concat_w, row, C, S, SP, BC)
        mixed = tl.dot(weight, tl.reshape(z, (SP * BC, P)), input_precision="tf32x3")
        mixed += tl.load(concat_b + row * C + channel, mask=channel < C, other=0.0)[:, None]
    else:
        mixed = tl.sum(_attention(z, bits, fusion_w, fusion_b, row, C, S, SP, BC)[:, None, :] * z, axis=0)
    return mixed


@triton.jit
def _softmax(mixed, C, BC: tl.constexpr):
    """p (BC, P), and the logarithm of the sum of exponentials (P,)."""
    mixed = tl.where(tl.arange(0, BC)[:, None] < C, mixed, float("-inf"))
    top = tl.max(mixed, axis=0)
    e = tl.exp(mixed - top[None, :])
    total = tl.sum(e, axis=0)
    return e / total[None, :], top + tl.log(total)


@triton.jit
def statistics_kernel(z, labels, y, valid, operators, subsets, rows, concat_w, concat_b, fusion_w, fusion_b,
                      cross_entropy, intersection, volume, M, B, C, N, S, SP: tl.constexpr, BC: tl.constexpr,
                      P: tl.constexpr, REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Adds the sums over the block to cross_entropy (M,), intersection and volume (M, B, C)."""
    pixels, sample = tl.program_id(0) * P + tl.arange(0, P), tl.program_id(1)
    channel = tl.arange(0, BC)
    scales = _load_scales(z, sample, pixels, B, C, N, S, SP, BC)
    truth, counts = _load_truth(labels, y, valid, sample, pixels, C, N, BC, REGIONS, VALID)
    for i in range(M):
        bits = ((tl.load(subsets + i) >> tl.arange(0, SP)) & 1) == 1
        mixed = _mix(scales, tl.load(operators + i), bits, tl.load(rows + i), concat_w, concat_b, fusion_w, fusion_b,
                     C, S, SP, BC, P)  # fmt: skip
        if REGIONS:
            p = 1 / (1 + tl.exp(-mixed))
            entropy = tl.maximum(mixed, 0.0) - mixed * truth + tl.log(1 + tl.exp(-tl.abs(mixed)))
            entropy = tl.sum(tl.where(channel[:, None] < C, entropy, 0.0), axis=0)
        else:
            p, log_sum = _softmax(mixed, C, BC)
            entropy = log_sum - tl.sum(mixed * truth, axis=0)
        at = (i * B + sample) * C + channel
        tl.atomic_add(cross_entropy + i, tl.sum(entropy * counts, axis=0))
        tl.atomic_add(intersection + at, tl.sum(p * truth, axis=1), mask=channel < C)
        tl.atomic_add(volume + at, tl.sum(p * counts[None, :], axis=1), mask=channel < C)


@triton.jit
def gradient_kernel(z, labels, y, valid, operators, subsets, rows, concat_w, concat_b, fusion_w, fusion_b,
                    by_cross_entropy, by_intersection, by_volume,
                    of_z, of_concat_w, of_concat_b, of_fusion_w, of_fusion_b,
                    M, B, C, N, S, SP: tl.constexpr, BC: tl.constexpr,
                    P: tl.constexpr, REGIONS: tl.constexpr, VALID: tl.constexpr):  # fmt: skip
    """Writes of_z (S, B, C, N), and adds to the gradients of the parameters."""
    pixels, sample = tl.program_id(0) * P + tl.arange(0, P), tl.program_id(1)
    scale, channel = tl.arange(0, SP), tl.arange(0, BC)
    scales = _load_scales(z, sample, pixels, B, C, N, S, SP, BC)
    truth, counts = _load_truth(labels, y, valid, sample, pixels, C, N, BC, REGIONS, VALID)
    total = tl.zeros((SP, BC, P), tl.float32)
    for i in range(M):
        operator, row = tl.load(operators + i), tl.load(rows + i)
        bits = ((tl.load(subsets + i) >> scale) & 1) == 1
        chosen = bits[:, None, None]
        mixed = _mix(scales, operator, bits, row, concat_w, concat_b, fusion_w, fusion_b, C, S, SP, BC, P)

        # the gradient by the map, (BC, P): as ClassTerms.gradient and RegionTerms.gradient
        at = (i * B + sample) * C + channel
        entropy = tl.load(by_cross_entropy + i)
        a = (
            tl.load(by_volume + at, mask=channel < C, other=0.0)[:, None]
            + truth * tl.load(by_intersection + at, mask=channel < C, other=0.0)[:, None]
        )
        if REGIONS:
            p = 1 / (1 + tl.exp(-mixed))
            gradient = a * p * (1 - p) + entropy * (p - truth)
        else:
            p, log_sum = _softmax(mixed, C, BC)
            gradient = p * (a - tl.sum(a * p, axis=0)[None, :] + entropy) - entropy * truth
        gradient = tl.where(channel[:, None] < C, gradient * counts[None, :], 0.0)

        # back to the scales and the parameters: as the banks of the lean backend
        if operator == 0:
            total += tl.where(chosen, gradient[None, :, :], 0.0)
        elif operator == 1:
            for j in tl.static_range(SP):
                here = (scale == j)[:, None, None]
                others = tl.reduce(tl.where(chosen & ~here, scales, 1.0), 0, _product)
                total += tl.where(here & chosen, (gradient * others)[None, :, :], 0.0)
        elif operator == 2:
            concat_weight = _concat_weight(concat_w, row, C, S, SP, BC)
            back = tl.dot(tl.trans(concat_weight), gradient, input_precision="tf32x3")
            total += tl.reshape(back, (SP, BC, P))
            of_concat = tl.dot(gradient, tl.trans(tl.reshape(scales, (SP * BC, P))), input_precision="tf32x3")
            column = tl.arange(0, SP * BC)[None, :]
            s_of, c_of = column // BC, column % BC
            concat_at = of_concat_w + ((row * C + channel[:, None]) * S + s_of) * C + c_of
            tl.atomic_add(concat_at, of_concat, mask=(channel[:, None] < C) & (s_of < S) & (c_of < C))
            tl.atomic_add(of_concat_b + row * C + channel, tl.sum(gradient, axis=1), mask=channel < C)
        else:
            attention = _attention(scales, bits, fusion_w, fusion_b, row, C, S, SP, BC)
            by_attention = tl.sum(gradient[None, :, :] * scales, axis=1)
            by_scores = attention * (by_attention - tl.sum(attention * by_attention, axis=0)[None, :])
            fusion_weight = _fusion_weight(fusion_w, row, C, S, SP, BC)
            total += attention[:, None, :] * gradient[None, :, :] + fusion_weight[:, :, None] * by_scores[:, None, :]
            of_fusion = tl.sum(by_scores[:, None, :] * scales, axis=2)
            fusion_at = of_fusion_w + (row * S + scale[:, None]) * C + channel[None, :]
            tl.atomic_add(fusion_at, of_fusion, mask=(scale[:, None] < S) & (channel[None, :] < C))
            tl.atomic_add(of_fusion_b + row * S + scale, tl.sum(by_scores, axis=1), mask=scale < S)
    s, c, n = scale[:, None, None], channel[None, :, None], pixels[None, None, :]
    tl.store(of_z + ((s * B + sample) * C + c) * N + n, total, mask=(s < S) & (c < C) & (n < N))
