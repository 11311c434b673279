"""The GEMMs of quant.py on integer units: int8 operands, int32 accumulation, scales in the epilogue.

    output       y  = (codes_x   @ codes_w.T) * s_x * s_w          x per token (or tensor), w per output (or tensor)
    grad_input   dx = (codes_g   @ codes_w)   * s_g                g * s_w rounded per token: quant.fold
    grad_weight  dw = (codes_g.T @ codes_x)   * s_gT               g * s_x rounded per output of g.T: quant.fold

`--gemm=int8` with `--wbits=8 --abits=8` runs the first on integers, and the two of backward in the compute dtype on the
int8 codes of forward; `--gbits=8 --ggran=per_row --ggemm=both` all three. The numbers are those of
`--gemm=simulate` with the same flags, up to the rounding of the epilogue: there the products of codes are summed in
floating point, exactly up to K = 1040 in fp32 (K 127^2 < 2^24), here in int32, exactly up to K = 133,000. Which of
the two is faster is the device's business: on a CPU this one (results/int8.md), on an H100 the other (results/gpu.md).

The other half of the file is memory: `keep8` lets GELU and attention, which are no GEMMs of ours, keep their inputs for
backward in int8 as the linear layers do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant import Quantized, Quantizer, gemm, restore, row_scale


def int8_gemm(a: Tensor | Quantized, b: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """Compute A @ B.T in int8 for quantized a (R, L), b (S, L) -> (R, S) in `dtype`; the arguments of quant.gemm.

    With one operand in floating point (the gradient, unless --gbits) there is no integer GEMM: that one is quant.gemm.

    Raises: ValueError for more than 133,144 products in a sum; on a GPU for L or S that its GEMM does not take.
    """
    if not (isinstance(a, Quantized) and isinstance(b, Quantized)):
        return gemm(a, b, dtype)
    assert a.scale.shape[2] == b.scale.shape[2] == 1 and a.zero_point is b.zero_point is None, \
        "QuantConfig refuses what does not factor out: scales along the contraction, zero points"
    (rows, length), x = a.codes.shape, a.codes  # R, L
    if length * 127**2 >= 2**31:
        raise ValueError(f"--gemm=int8 sums {length} products, more than int32 holds (133,144); "
                         "use a smaller --batch_size")
    w = b.codes.T  # a view: on a CPU a contiguous copy of g.T or x.T costs more than its GEMM
    # cuBLAS: more than 16 rows, the other two sizes multiples of 8, and both operands contiguous along L: newer ones
    # have no kernel where neither is transposed (pytorch issue 169956)
    if x.is_cuda:
        if length % 8 or b.codes.shape[0] % 8:
            raise ValueError(f"--gemm=int8 on a GPU needs sizes that are multiples of 8, not {rows} x "
                             f"{length} x {b.codes.shape[0]}; change --n_embd, --batch_size or use --gemm=simulate")
        x, w = F.pad(x, (0, 0, 0, max(0, 17 - rows))).contiguous(), b.codes.contiguous().T
    if 1 in (*x.shape, *w.shape):  # torch 2.13's CPU misreads a transposed view with an axis of 1
        x, w = (z.clone(memory_format=torch.contiguous_format) for z in (x, w))
    y = torch._int_mm(x, w)[:rows]  # (R, S) int32
    y = y.float() * row_scale(a) * row_scale(b).T  # (R, S) * (R, 1) * (1, S)
    return y if y.dtype == dtype else y.to(dtype)  # as quant.gemm


# -----------------------------------------------------------------------------
# what other layers keep for backward

class _Keep8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, block):
        q = Quantizer(8, (1, block)).quantize(x.flatten(0, -2))  # (M, C)
        ctx.f, ctx.shape, ctx.dtype = f, x.shape, x.dtype
        ctx.save_for_backward(q.codes, q.scale)
        return f(x)  # of the exact x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        codes, scale = ctx.saved_tensors
        x = restore(Quantized(codes, scale, None)).view(ctx.shape).to(ctx.dtype)  # (..., C) rounded
        return torch.func.vjp(ctx.f, x)[1](g)[0], None, None


def keep8(f: Callable[[Tensor], Tensor], x: Tensor, block: int | None = None) -> Tensor:
    """Return f(x), keeping for backward nothing but x in int8 codes, from which backward runs f again.

    The output is exact, the gradient is that of f at the rounded x.

    Args:
        f: deterministic, a pure function of x.  x: (..., C).  block: elements of a row that share a scale; None: C.
    Source: the idea of Chen et al. 2021, arXiv 2104.14129 (ActNN), with the quantizer of quant.py.
    """
    return _Keep8.apply(x, f, block) if torch.is_grad_enabled() else f(x)
