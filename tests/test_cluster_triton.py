"""The Triton kernels of cluster attention against the reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from conftest import TRITON_REFUSAL, sparse
from contract import assert_blind, assert_contract, blind_inputs
from guarded import assert_exits_well
from torch import Tensor

if TRITON_REFUSAL is not None:
    pytest.skip(TRITON_REFUSAL, allow_module_level=True)

import triton
import triton.language as tl

from vitkernels._triton import Order, node_start
from vitkernels.cluster_attention import cluster_attention, kernels
from vitkernels.cluster_attention.reference import cluster_attention as reference
from vitkernels.tree import Tree

INTERPRETED = bool(triton.knobs.runtime.interpret)


def random_order(batch: int, heads: int, tokens: int) -> Tensor:
    """[B, heads, N] int32, every row a permutation."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, heads, tokens, generator=generator).argsort(-1).int()


def random_inputs(batch: int, tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and output gradient in float64."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return [draw(batch, tokens, heads, head_dim) for _ in range(4)]


def run(q, k, v, dout, order, leaf_size, overlap, scale=0.3) -> list[Tensor]:
    """The launchers: out and dqkv."""
    out, statistic = kernels.cluster_attention_forward(q, k, v, order, leaf_size, overlap, scale, False)
    return [out, kernels.cluster_attention_backward(dout, q, k, v, order, statistic, leaf_size, overlap, scale)]


def check(tokens, leaf_size, overlap, heads, head_dim, dtype, device, batch=1, scale=None) -> None:
    """The numerical contract for the output and the gradients of q, k and v."""
    *qkv, cotangent = random_inputs(batch, tokens, heads, head_dim)
    order = random_order(batch, heads, tokens)
    arguments = dict(leaf_size=leaf_size, overlap=overlap, scale=scale)

    def ours(*qkv):  # as views of one packed tensor
        views = torch.stack(qkv, 2).unbind(2)
        return cluster_attention(*views, order.to(device), backend="triton", **arguments)

    assert_contract(ours, functools.partial(reference, order=order, **arguments), qkv, cotangent, dtype, device=device)


SHAPES = {  # tokens, leaf_size, overlap
    "one token": (1, 1, 0),
    "leaves of 1 and 2": (5, 1, 1),
    "leaves of 7, every key of the sibling": (14, 7, 7),
    "a single leaf borrows nothing": (9, 7, 20),
    "leaves of 16": (32, 16, 5),
    "leaves of 16 and 17, no overlap": (33, 16, 0),
    "leaves of 24 and 25, overlap of all": (49, 20, 24),
    "leaves of 49": (98, 49, 20),
    "leaves of 49 and 50": (99, 49, 20),
    "64 tokens": (64, 49, 20),
    "65 tokens": (65, 49, 20),
    "leaves of 72": (144, 72, 20),
    "leaves of 65 and 66, no overlap": (131, 65, 0),
    "leaves of 65 and 66, overlap of all": (131, 65, 65),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, device):
    check(*SHAPES[shape], 1, 16, torch.float32, device)


@pytest.mark.parametrize("shape", ["leaves of 16 and 17, no overlap", "leaves of 49 and 50", "65 tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(shape, dtype, device):
    check(*SHAPES[shape], 1, 32, dtype, device)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 72])
def test_head_dims(head_dim, device):
    check(18, 8, 4, 2, head_dim, torch.bfloat16, device)
    check(65, 65, 0, 1, head_dim, torch.float32, device)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_images_and_scales(scale, device):
    check(9, 4, 3, 2, 8, torch.float32, device, batch=2, scale=scale)


@pytest.mark.parametrize("tokens, leaf_size", [(9, 4), (65, 65)])
def test_strides(tokens, leaf_size, device):
    """Rows that are not aligned, strides of all kinds, and an order that heads share; nothing is copied."""
    plain = [x.float().to(device) for x in random_inputs(1, tokens, 2, 8)]
    order = random_order(1, 1, tokens).to(device).expand(-1, 2, -1)
    q, k, v, dout = plain
    wide = q.new_zeros(1, tokens, 2, 11)
    wide[..., 1:9] = q
    odd = [wide[..., 1:9], k.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((v, v), 2)[:, :, 1]]
    odd.append(dout[:, :, :1].expand(-1, -1, 2, -1))
    plain[3] = odd[3].contiguous()
    for a, b in zip(run(*odd, order, leaf_size, 3), run(*plain, order.contiguous(), leaf_size, 3)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("leaf_size", [8, 100])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_blind_query(leaf_size, device):
    inputs = [x.to(device) for x in blind_inputs(1, 100, 2, 8)]
    order = torch.arange(100, dtype=torch.int32, device=device).expand(1, 2, -1)
    out, dqkv = run(*inputs, inputs[2], order, leaf_size, 3)
    assert_blind(out, *dqkv.unbind(2))


def test_one_hot_softmax_gathers_exactly(device):
    """Every token attends to the one at the next place of its leaf, and to nothing else: out is a gather of v."""
    tokens, leaf_size = 32, 16
    order = random_order(1, 1, tokens)
    code = torch.eye(leaf_size).repeat(2, 1)  # [places, D]
    q, k, expected = (torch.empty(1, tokens, 1, leaf_size) for _ in range(3))
    v = torch.arange(tokens * leaf_size, dtype=torch.float32).view(1, tokens, 1, leaf_size)
    place, follower = order[0, 0].long(), torch.arange(tokens).view(2, leaf_size).roll(-1, 1).flatten()
    q[0, place, 0], k[0, place, 0] = code[follower], code
    expected[0, place] = v[0, place[follower]]
    q, k, v, order = (x.to(device) for x in (q, k, v, order))
    out = cluster_attention(q, k, v, order, leaf_size=leaf_size, overlap=0, scale=1e4, backend="triton")
    assert torch.equal(out.cpu(), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
@pytest.mark.parametrize("tokens, leaf_size", [(20, 5), (65, 65)])
def test_nan_stays_in_its_pair_and_head(tokens, leaf_size, poisoned, device):
    inputs = [x.float().to(device) for x in random_inputs(1, tokens, 2, 8)]
    order = random_order(1, 2, tokens)
    inputs["qkv".index(poisoned)][0, order[0, 0, 3], 0] = float("nan")
    out, dqkv = (x.cpu() for x in run(*inputs, order.to(device), leaf_size, 2))
    elsewhere = torch.ones(tokens, 2, dtype=torch.bool)
    elsewhere[order[0, 0, :10] if tokens == 20 else slice(None), 0] = False
    assert out[0, elsewhere].isfinite().all() and dqkv[0].transpose(1, 2)[elsewhere].isfinite().all()
    assert out[0, ~elsewhere].isnan().any()


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize("tokens, leaf_size", [(9, 4), (65, 65)])
def test_gradcheck(tokens, leaf_size):
    qkv = [x.requires_grad_() for x in random_inputs(1, tokens, 1, 8)[:3]]
    arguments = dict(order=random_order(1, 1, tokens), leaf_size=leaf_size, overlap=3, backend="triton")
    attend = functools.partial(cluster_attention, check=False, **arguments)
    torch.autograd.gradcheck(attend, qkv, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("tokens, leaf_size, overlap", [(18, 8, 5), (70, 70, 0)])
def test_same_bits_every_run(tokens, leaf_size, overlap, device):
    inputs = [x.float().to(device) for x in random_inputs(1, tokens, 1, 16)]
    order = random_order(1, 1, tokens).to(device)
    first, *others = (run(*inputs, order, leaf_size, overlap) for _ in range(2 if INTERPRETED else 20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("leaf_size", [4, 100])
def test_empty_batch(leaf_size, device):
    q, order = torch.zeros(0, 100, 2, 16, device=device), torch.zeros(0, 2, 100, dtype=torch.int32, device=device)
    out, dqkv = run(q, q, q, q, order, leaf_size, 0)
    assert out.shape == q.shape and dqkv.shape == (0, 100, 3, 2, 16)


@pytest.mark.parametrize("tokens, leaf_size", [(9, 4), (65, 65)])
def test_opcheck(tokens, leaf_size, device):
    q, k, v, dout = (x.float().to(device) for x in random_inputs(1, tokens, 1, 8))
    order, suffix = random_order(1, 1, tokens).to(device), "_interpreted" if INTERPRETED else ""
    forward, backward = (
        getattr(torch.ops.vitkernels, f"cluster_attention_{name}{suffix}").default for name in ("forward", "backward")
    )
    statistic = forward(q, k, v, order, leaf_size, 2, 0.3, False)[1]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (q, k, v, order, leaf_size, 2, 0.3, False), test_utils=utilities)
    torch.library.opcheck(backward, (dout, q, k, v, order, statistic, leaf_size, 2, 0.3), test_utils=utilities)


@pytest.mark.parametrize(
    "shape, leaf_size, strides",
    [
        ((3, 4, 1, 8), 2, (2**30 + 8, 8, 0)),  # a stride of 32 bits, a product of more
        ((1, 4, 1, 8), 2, (0, 2**30, 0)),
        ((1, 4, 2, 8), 2, (0, 16, 2**31)),
        ((1, 65, 1, 8), 65, (0, 2**25 + 8, 0)),
    ],
)
def test_addresses_past_2_31_elements(shape, leaf_size, strides, device):
    batch, tokens, heads, _ = shape
    near = [x.half().to(device) for x in random_inputs(*shape)]
    order, far = random_order(batch, heads, tokens).to(device), []
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1))), device)
        far.append(storage.as_strided(x.shape, (*strides, 1)).copy_(x))
    far_order = sparse(2 * (2**30 * (batch - 1) + heads * tokens), device).view(torch.int32)
    far_order = far_order.as_strided(order.shape, (2**30, tokens, 1)).copy_(order)
    expected = run(*near, order, leaf_size, 1)
    assert all(torch.equal(a, b) for a, b in zip(run(*far, far_order, leaf_size, 1), expected))


@pytest.mark.skipif(not INTERPRETED, reason="page protection is the CPU's")
def test_no_order_leads_outside_the_tensors():
    """Orders of values that are no tokens, and tensors between inaccessible pages: a lane outside kills the process."""
    assert_exits_well("cluster_guard_pages.py")


@triton.jit
def _write_starts(p_starts, order, BLOCK: tl.constexpr):
    node = tl.arange(0, BLOCK)
    tl.store(p_starts + node, node_start(node, order))


def test_tree_map(device):
    """The jitted map is the one of vitkernels/tree.py, past 32 bits too; beyond the last leaf it is N."""
    draw = random.Random(0)
    trees = [Tree.of(draw.randint(1, 5000), draw.randint(1, 60)) for _ in range(20)] + [Tree(2**31 - 1, 5)]
    for tree in trees:
        starts = torch.empty(4096, dtype=torch.int32, device=device)
        order = Order.of(starts.expand(1, 1, -1), tree.levels, 0)._replace(tokens=tree.tokens)
        _write_starts[(1,)](starts, order, BLOCK=4096)
        expected = torch.full((4096,), tree.tokens)
        expected[: (1 << tree.levels) + 1] = tree.bounds(tree.levels)[:4096]
        assert torch.equal(starts.cpu().long(), expected)


def test_refusals():
    assert "head_dim 136 > 128" in kernels.refusal(136, torch.float32)
    assert (kernels.refusal(32, torch.float64) is None) == INTERPRETED
