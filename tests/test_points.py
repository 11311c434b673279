"""extensions/points.py: Q(w) and its gradients against loops and central differences in float64, and its files."""

import heapq
import math

import numpy as np
import pytest
import torch
from conftest import same
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extensions.points import Student, matrices, nearest, quantize, scaled, share_out
from model import GPT, GPTConfig, Teacher, quant_linears
from quant import QuantConfig
from support.codes import huffman, unhuffman


def gpt(seed=0, quant=None, **shape):
    """Build a tiny GPT (V=64, of which 14 padding) with weights of all sizes."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(1, 2, 32, 16, **shape), 50, quant_linears(QuantConfig(**(quant or {})), 1))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def tokens(seed, *shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# Q(w)

def matrix(n, k, seed, size):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * size


def naive(w, points, bucket):
    """Return Q(w) and the indices, weight by weight, in float64."""
    flat, p = w.flatten().double().tolist(), points.double().tolist()
    q, indices = [], []
    for start in range(0, len(flat), bucket or len(flat)):
        part = flat[start:start + (bucket or len(flat))]
        alpha, beta = max(part) - min(part), min(part)
        alpha = alpha if alpha >= 1e-10 else 1.0
        for value in part:
            distances = [abs((value - beta) / alpha - point) for point in p]
            indices.append(max(i for i, d in enumerate(distances) if d == min(distances)))
            q.append(p[indices[-1]] * alpha + beta)
    return torch.tensor(q, dtype=torch.float64).view(w.shape), torch.tensor(indices)


@given(n=st.integers(1, 9), k=st.integers(1, 40), s=st.sampled_from([2, 3, 4, 7, 16, 255, 256]),
       bucket=st.sampled_from([0, 2, 3, 7, 256]), seed=st.integers(0, 999), size=st.sampled_from([0.02, 1.0, 1e8]))
@settings(max_examples=150)
@example(n=1, k=1, s=2, seed=0, bucket=0, size=1.0)
def test_uniform_points(n, k, s, seed, bucket, size):
    w, p = matrix(n, k, seed, size), torch.arange(s) / (s - 1)
    x, alpha, beta = scaled(w, bucket)
    q, i = quantize(w, p, bucket), nearest(x, p)
    # half a step at most; the smallest weight of a bucket stays; the index is what rounding says, but for ties
    error, each = (q - w).abs(), alpha.expand_as(x).flatten()[:w.numel()].view(w.shape)
    assert (error <= each / (2 * (s - 1)) * (1 + 1e-4) + 1e-6 * w.abs()).all() and x.min() == 0 and x.max() <= 1
    assert torch.equal(scaled(q, bucket)[2], beta)
    fraction = (x * (s - 1)) % 1
    clear = (fraction - 0.5).abs() > 1e-4
    assert torch.equal(i[clear], torch.round(x * (s - 1)).long()[clear])
    # Q(w) has the indices it was made from, and a power of two goes through it bit for bit
    assert torch.equal(nearest(scaled(q, bucket)[0], p), i)
    assert torch.equal(quantize(w * 2**10, p, bucket), q * 2**10)


@given(seed=st.integers(0, 999), s=st.integers(2, 20), bucket=st.sampled_from([0, 2, 5]), twins=st.booleans())
@settings(max_examples=60)
def test_any_points(seed, s, bucket, twins):
    """The nearest of sorted points, in [0, 1] or not, some of them equal: as a loop finds it in float64."""
    g = torch.Generator().manual_seed(seed)
    p, w = (torch.rand(s, generator=g).double() * 1.5 - 0.2).sort().values, matrix(4, 7, seed, 1.0).double()
    p[1] = p[0] if twins else p[1]
    q, i = naive(w, p, bucket)
    torch.testing.assert_close(quantize(w, p, bucket), q, rtol=0, atol=1e-12)
    assert twins or torch.equal(nearest(scaled(w, bucket)[0], p).flatten()[:28], i)


def test_corners():
    """Ties go up; constant, single and short matrices; a transposed one is what it is, not how it lies in memory."""
    x, p = torch.tensor([0.0, 0.25, 0.4999, 0.75, 1.0]), torch.tensor([0.0, 0.5, 1.0])
    assert nearest(x, p).tolist() == [0, 1, 1, 2, 2]
    p = torch.tensor([0.0, 1.0])
    for w in (torch.full((3, 5), 0.3), torch.tensor([[7.0]]), torch.zeros(2, 2)):
        assert torch.equal(quantize(w, p, 4), w)
    assert [t.tolist() for t in scaled(torch.tensor([[3.0, 1.0, 2.0]]), 2)] == [
        [[1, 0], [0, 0]], [[2], [1]], [[1], [2]]]
    w = matrix(6, 10, 0, 1.0)
    assert torch.equal(quantize(w.T, p, 7), quantize(w.T.contiguous(), p, 7))
    assert torch.equal(quantize(w, p, 256), quantize(w, p, 0))


@pytest.mark.parametrize("bucket", [0, 8])
def test_gradients(bucket):
    """dL/dw is dL/dQ; dL/dp is that of central differences with the indices frozen, in float64."""
    w, p = matrix(6, 12, 0, 3.0).double().requires_grad_(), torch.tensor([0.1, 0.3, 0.8, 0.9]).double().requires_grad_()
    weight = matrix(6, 12, 1, 1.0).double()
    q = quantize(w, p, bucket)
    q.retain_grad()
    (torch.tanh(q) * weight).sum().backward()
    assert torch.equal(w.grad, q.grad)
    x, alpha, beta = scaled(w.detach(), bucket)
    assert (alpha - 1).abs().min() > 0.5  # it has a part in the gradient
    i = nearest(x, p.detach())

    def loss(p):
        frozen = (p[i] * alpha + beta).flatten()[:72].view(6, 12)
        return (torch.tanh(frozen) * weight).sum().item()
    step = 1e-5 * torch.eye(4).double()
    found = [(loss(p.detach() + h) - loss(p.detach() - h)) / 2e-5 for h in step]
    assert p.grad.tolist() == pytest.approx(found, rel=1e-4)


@given(norms=st.lists(st.just(0.0) | st.floats(1e-9, 1e3), min_size=1, max_size=30), s=st.integers(2, 256))
@example(norms=[1.0, 0.0, 0.0], s=2)
@example(norms=[1e3, 1e-3, 1e-3, 1e-3], s=200)  # more than 256 for the first
def test_share_out(norms, s):
    """The total is exact; s/2, but 2 at least, 256 at most; more norm, no fewer points; largest remainders."""
    counts, low = share_out(norms, s), max(2, s // 2)
    assert sum(counts) == s * len(norms) and low <= min(counts) <= max(counts) <= 256
    for a, b in zip(norms, counts, strict=True):
        assert all(b >= d for c, d in zip(norms, counts, strict=True) if a > c)
    shares = [(s - low) * len(norms) * n / (sum(norms) or 1) for n in norms]
    if min(norms) > 0 and max(shares) < 256 - low:  # nobody is full: each share is rounded down or up
        assert all(abs(n - low - share) < 1 for n, share in zip(counts, shares, strict=True))
        up = [share % 1 for n, share in zip(counts, shares, strict=True) if n - low > share]
        down = [share % 1 for n, share in zip(counts, shares, strict=True) if n - low <= share]
        assert min(up, default=1) >= max(down, default=0) - 1e-6


# -----------------------------------------------------------------------------
# the student

@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("quant, shape", [({}, {}), (dict(abits=8, quant_head=True), dict(untied_head=True))], ids=str)
def test_student_is_the_model_at_q(quant, shape, trained):
    """Loss and gradients are those of a GPT that holds Q(w), a tied head's too; w stays."""
    model, idx, t = gpt(quant=quant, **shape), tokens(0, 2, 16), tokens(1, 2, 16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    teacher = Teacher(torch.randn(32, 24), torch.randn(64, 24), 2.0, 0.7)
    student = Student(model, [5] * len(matrices(model)), 32, trained)
    twin = student.rounded()
    loss, expected = student(idx, t, teacher), twin(idx, t, teacher)
    loss.backward(), expected.backward()
    assert torch.equal(loss, expected) and same(before, dict(model.named_parameters()))
    assert len(student.levels) == 6 + bool(shape)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and torch.equal(p, q) == (p.dim() < 2), name


def test_points_begin_as_quantiles_and_are_sorted_when_used():
    student = Student(model := gpt(), [2, 3, 5, 4, 4, 256], 32, trained=True)
    w, p = student.pairs()["h.0.attn.c_attn.weight"]
    x = scaled(w, 32)[0]
    assert p.tolist() == pytest.approx([x.flatten().quantile(i / 4).item() for i in range(5)], abs=1e-6)
    expected = student.weights()
    student.points.data = torch.cat([part.flip(0) for part in student.points.data.split(student.levels)])
    assert same(expected, student.weights()) and list(expected) == list(matrices(model))


@pytest.mark.parametrize("s", [4, 16, 256])
def test_huffman(s):
    """Lossless, and hardly longer than Huffman's code of the frequencies, which lies within a bit of the entropy."""
    points = torch.tensor(np.random.default_rng(0).normal(size=200_000)).clamp(-3, 3)
    codes = ((points + 3) / 6 * (s - 1)).round().long()
    counts = codes.bincount(minlength=s)
    heap = [n for n in counts.tolist() if n]
    heapq.heapify(heap)
    ideal = 0  # bits of all codes: each merge of two nodes gives every code below a bit more
    while len(heap) > 1:
        heapq.heappush(heap, both := heapq.heappop(heap) + heapq.heappop(heap))
        ideal += both
    entropy = torch.distributions.Categorical(counts.double()).entropy().item() / math.log(2)
    size = 8 * len(huffman([codes])) / len(codes)
    assert torch.equal(unhuffman(huffman([codes, codes[:0], s - 1 - codes])), torch.cat((codes, s - 1 - codes)))
    assert entropy <= ideal / len(codes) <= size < 1.03 * ideal / len(codes) and size < entropy + 1
