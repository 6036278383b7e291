"""The row pass of linear_cross_entropy: turn a slab of logits into its own gradient, and write each row's loss.

Memory bounds it. One program owns one row and goes over it in blocks, twice: for the sum, relative to the largest logit so far,
and for the gradient, which overwrites the row (6 bytes a bf16 logit; the second read finds much of a row in the second-level
cache). For losses alone it goes once. Blocks serve any number of columns: a whole row in one block would be padded to a power of
two and kept in registers.

The target is kept apart from the others, as in csrc/cross_entropy/rule.h. The bias's gradient is the column sums, in two stages.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x for x <= 0 to a few units in the last place; tl.exp is off by 2^-24 x, which is visible in a loss of 1e-12."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.where(x < -87.0, 0.0, tl.exp2(r * 1.4426950408889634) * tl.exp2(n))  # NaN compares false and stays


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to a few units in the last place: the rounding of 1 + x is divided out (Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def load_target(Logits, Hidden, Weight, Bias, Rates, i, target, inside, elapsed, width, BLOCK_D: tl.constexpr):
    """The target's logit: hidden . weight[target] + bias[target] in fp32 if hidden is given, else as stored; with rates, minus
    elapsed * rate. -inf if the target is out of range.
    """
    if Hidden is not None:
        shares = tl.zeros((BLOCK_D,), tl.float32)
        for d in range(0, width, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m = (o_d < width) & inside
            b_hidden = tl.load(Hidden + i * width + o_d, mask=m, other=0.0).to(tl.float32)
            shares += b_hidden * tl.load(Weight + target * width + o_d, mask=m, other=0.0).to(tl.float32)
        at_target = tl.sum(shares, 0)
        if Bias is not None:
            at_target += tl.load(Bias + target, mask=inside, other=0.0).to(tl.float32)
    else:
        at_target = tl.load(Logits + target, mask=inside, other=0.0).to(tl.float32)
    if Rates is not None:
        at_target -= elapsed * tl.load(Rates + target, mask=inside, other=0.0)
    return tl.where(inside, at_target, float("-inf"))


@triton.jit
def sum_up(Logits, Rates, column, columns, elapsed, BLOCK: tl.constexpr):
    """For a row without its target: the largest logit, and the sums of e^x, e^x x and e^x rate for x = z - largest. z is the
    logit; with rates, minus elapsed * rate.
    """
    largest = tl.full((), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    rated = tl.zeros((BLOCK,), tl.float32)
    for p in range(0, columns, BLOCK):
        o = p + tl.arange(0, BLOCK)
        z = tl.load(Logits + o, mask=o < columns, other=float("-inf")).to(tl.float32)
        if Rates is not None:
            rate = tl.load(Rates + o, mask=o < columns, other=0.0)
            z -= elapsed * rate
        z = tl.where(o == column, float("-inf"), z)
        higher = tl.maximum(largest, tl.max(z, 0))
        base = tl.where(higher > float("-inf"), higher, 0.0)
        shift = tl.where(largest > float("-inf"), largest - base, 0.0)
        factor = exp(shift)
        x = z - base
        power = exp(x)
        moments = factor * (moments + sums * shift) + power * tl.maximum(x, -1e4)  # the last term is 0 if x is -inf
        sums = sums * factor + power
        if Rates is not None:
            rated = rated * factor + power * rate
        largest = higher
    return largest, tl.sum(sums, 0), tl.sum(moments, 0), tl.sum(rated, 0)


@triton.jit
def finish(of_others, others, moment, at_target, w):
    """As in csrc/cross_entropy/rule.h: nll, max_probability, entropy; largest, scale and the target's gradient; the
    probabilities of the others and of the target, and the factor from a sum over the others to its share.
    """
    first = at_target >= of_others
    largest = tl.where(first, at_target, of_others)
    shift = tl.where(others > 0.0, of_others - largest, 0.0)
    factor = exp(shift)
    rest = tl.where(others == 0.0, 0.0, others * factor)
    own = exp(at_target - largest)
    total = rest + own
    log_total = tl.where(first, log1p(rest), tl.log(total))
    own_moment = tl.where(own > 0.0, own * (at_target - largest), 0.0)
    rest_moment = tl.where(factor > 0.0, factor * (moment + others * shift), 0.0)
    entropy = log_total - (rest_moment + own_moment) / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    nll = log_total + (largest - at_target)
    return nll, 1.0 / total, entropy, largest, w / total, -w * (rest / total), rest / total, own / total, factor / total


@triton.jit
def write_gradient(Logits, Rates, column, columns, largest, scale, of_target, elapsed, speed, BLOCK: tl.constexpr):
    """The row's second pass. Logits past the last column are read as -inf and not written."""
    for p in range(0, columns, BLOCK):
        o = p + tl.arange(0, BLOCK)
        z = tl.load(Logits + o, mask=o < columns, other=float("-inf"))
        x = z.to(tl.float32)
        if Rates is not None:
            rate = tl.load(Rates + o, mask=o < columns, other=0.0)
            x -= elapsed * rate
        if z.dtype == tl.float32:
            gradient = scale * exp(x - largest)
        else:
            gradient = scale * tl.exp(x - largest)
        if Rates is not None:
            gradient *= rate - speed
        gradient = tl.where(o == column, of_target, gradient)
        tl.store(Logits + o, gradient.to(z.dtype), mask=o < columns)


@triton.jit
def write_row(Nll, MaxProbability, Entropy, Velocity, i, nll, max_probability, entropy, velocity):
    """Write one row's results."""
    tl.store(Nll + i, nll)
    if Velocity is not None:
        tl.store(Velocity + i, velocity)
    if MaxProbability is not None:
        tl.store(MaxProbability + i, max_probability)
    if Entropy is not None:
        tl.store(Entropy + i, entropy)


@triton.jit(do_not_specialize=["vocabulary"])
def _cross_entropy_kernel(
    Logits,
    Target,
    TokenWeight,
    Hidden,
    Weight,
    Bias,
    Nll,
    MaxProbability,
    Entropy,
    Rates,
    Elapsed,
    Velocity,
    columns,
    stride,
    width,
    vocabulary,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    Logits += i * stride
    w = tl.full((), 1.0, tl.float32)
    if TokenWeight is not None:
        w = tl.load(TokenWeight + i)
    if w == 0.0:  # logits may be anything, and are not read
        zero = w * 0.0
        write_row(Nll, MaxProbability, Entropy, Velocity, i, zero, zero, zero, zero)
        if GRADIENT:
            for p in range(0, columns, BLOCK):
                o = p + tl.arange(0, BLOCK)
                tl.store(Logits + o, tl.zeros((BLOCK,), Logits.dtype.element_ty), mask=o < columns)
    else:
        target = tl.load(Target + i)
        inside = (target >= 0) & (target < vocabulary)
        column = tl.where(inside, target, -1).to(tl.int32)
        elapsed = tl.full((), 0.0, tl.float32)
        if Elapsed is not None:
            elapsed = tl.load(Elapsed + i)
        at_target = load_target(Logits, Hidden, Weight, Bias, Rates, i, target, inside, elapsed, width, BLOCK_D)
        of_others, others, moment, rated = sum_up(Logits, Rates, column, columns, elapsed, BLOCK)
        nll, max_probability, entropy, largest, scale, of_target, q, own, factor = finish(of_others, others, moment, at_target, w)
        nll = tl.where(inside, nll, float("nan"))
        speed = tl.full((), 0.0, tl.float32)
        if Rates is not None:
            own_rate = tl.load(Rates + target, mask=inside, other=0.0)
            rate_of_others = tl.where(others == 0.0, 0.0, rated * factor)
            speed = rate_of_others - own_rate * q
            of_target = -w * (own_rate * q * q + rate_of_others * own)
        velocity = tl.where(inside, speed, float("nan"))
        write_row(Nll, MaxProbability, Entropy, Velocity, i, nll, max_probability, entropy, velocity)
        if GRADIENT:
            write_gradient(Logits, Rates, column, columns, largest, scale, of_target, elapsed, speed, BLOCK)


@triton.jit(do_not_specialize=["rows", "rows_of_split"])
def _column_sum_kernel(
    Gradient, Sums, rows, columns, stride, rows_of_split, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Reads the slab once. A program owns BLOCK_N columns of one split of the rows; Sums is [splits, columns]."""
    split = tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.minimum((split + 1) * rows_of_split, rows)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(split * rows_of_split, last, BLOCK_M):
        o_m = r + tl.arange(0, BLOCK_M)
        m = (o_m < last)[:, None] & (o_n < columns)[None, :]
        sums += tl.load(Gradient + o_m.to(tl.int64)[:, None] * stride + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    p_sums = Sums + split.to(tl.int64) * columns + o_n
    total = tl.sum(sums, 0)
    if ADD:
        total += tl.load(p_sums, mask=o_n < columns, other=0.0)
    tl.store(p_sums, total, mask=o_n < columns)


@triton.jit(do_not_specialize=["splits"])
def _add_column_sums_kernel(BiasGradient, Sums, columns, splits, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < columns
    total = tl.zeros((BLOCK,), tl.float32)
    p_sums = Sums + o
    for _ in range(splits):
        total += tl.load(p_sums, mask=m, other=0.0)
        p_sums += columns
    tl.store(BiasGradient + o, tl.load(BiasGradient + o, mask=m, other=0.0) + total, mask=m)


def cross_entropy_(
    logits,
    target,
    token_weight,
    hidden,
    weight,
    bias,
    gradient,
    nll,
    max_probability,
    entropy,
    bias_gradient,
    rates,
    elapsed,
    velocity,
):
    """cross_entropy_ of atat_fast/ops/linear_cross_entropy/row_pass.py. Tensors are contiguous; rows of logits may be apart."""
    rows, columns = logits.shape
    if rows == 0 or columns == 0:
        return
    vocabulary = columns if weight is None else min(columns, weight.shape[0])
    width = 0 if hidden is None else hidden.shape[1]
    _cross_entropy_kernel[(rows,)](
        logits,
        target,
        token_weight,
        hidden,
        weight,
        bias,
        nll,
        max_probability,
        entropy,
        rates,
        elapsed,
        velocity,
        columns,
        logits.stride(0),
        width,
        vocabulary,
        GRADIENT=gradient,
        **configuration(columns, width),
    )
    if gradient and bias_gradient is not None:
        sum_columns(logits, bias_gradient)


def configuration(columns, width):
    """The compile-time sizes for rows of this length: 16 logits a thread, in blocks of at most 4,096. These, their sums and
    moments fit 80 registers, so three programs share a multiprocessor, with 24 KB of loads in flight. With rates it is 128
    registers and two programs.
    """
    block = min(4096, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "BLOCK_D": min(1024, max(16, triton.next_power_of_2(width))), "num_warps": max(1, block // 512)}


def sum_columns(slab, sums, block_m=16, block_n=256, ctas=1024, most_splits=32):
    """Add the column sums of slab [rows, columns] to sums [columns] fp32. Rows are split so that programs fill a GPU; the split
    depends on shapes only. Each split has a line of partial sums.
    """
    rows, columns = slab.shape
    strips = triton.cdiv(columns, block_n)
    splits = max(1, min(triton.cdiv(ctas, strips), triton.cdiv(rows, 4 * block_m), most_splits))
    rows_of_split = triton.cdiv(rows, splits)
    partial = sums if splits == 1 else torch.empty((splits, columns), dtype=torch.float32, device=slab.device)
    _column_sum_kernel[(strips, splits)](
        slab,
        partial,
        rows,
        columns,
        slab.stride(0),
        rows_of_split,
        ADD=splits == 1,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    if splits > 1:
        _add_column_sums_kernel[(triton.cdiv(columns, 1024),)](sums, partial, columns, splits, BLOCK=1024, num_warps=4)
