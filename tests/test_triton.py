"""The Triton launchers of partition attention against the reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import TRITON_REFUSAL, sparse
from contract import assert_contract
from guarded import assert_exits_well
from torch import Tensor
from torch.autograd import Function

if TRITON_REFUSAL is not None:
    pytest.skip(TRITON_REFUSAL, allow_module_level=True)

import triton
import triton.language as tl
from test_partition import random_partitions
from test_partition_attention import BLIND, assert_blind, attend_blindly

from vitkernels import Partition
from vitkernels._triton import Geometry, group_start, group_tokens
from vitkernels.partition_attention import kernels
from vitkernels.partition_attention.reference import partition_attention as reference
from vitkernels.position_bias.reference import dynamic_position_bias

INTERPRETED = bool(triton.knobs.runtime.interpret)


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, geometry, scale):
        out, statistic = kernels.partition_attention_forward(q, k, v, bias, [], False, geometry, scale)
        ctx.save_for_backward(q, k, v, bias, statistic)
        ctx.geometry, ctx.scale = geometry, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, bias, statistic = ctx.saved_tensors
        dqkv, dbias = kernels.partition_attention_backward(
            dout, q, k, v, bias, [], False, statistic, ctx.geometry, ctx.scale
        )
        return *dqkv.unbind(3), None if bias is None else dbias, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, partition: Partition, bias: Tensor | None, scale: float | None) -> Tensor:
    """The launchers behind the reference's signature."""
    geometry = geometry_of(partition, q.shape[1], q.shape[2])
    return _Attention.apply(q, k, v, bias, geometry, q.shape[-1] ** -0.5 if scale is None else scale)


def geometry_of(partition: Partition, height: int, width: int) -> tuple[int, ...]:
    partition = partition.on(height, width)
    return *partition.group, *partition.interval, *partition.shift


def random_inputs(partition: Partition, batch: int, height: int, width: int, heads: int, head_dim: int) -> list[Tensor]:
    """qkv, bias table and output gradient in float64."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gh, gw = partition.on(height, width).group
    qkv = draw(batch, height, width, 3, heads, head_dim)
    return [qkv, draw(heads, 2 * gh - 1, 2 * gw - 1), draw(batch, height, width, heads, head_dim)]


def check(partition, batch, height, width, heads, head_dim, dtype, device, scale=None, biased=True) -> None:
    """The numerical contract, for the output and the gradients of a packed qkv and of the bias table."""
    qkv, bias, cotangent = random_inputs(partition, batch, height, width, heads, head_dim)

    def packed(function):
        return lambda qkv, bias=None: function(*qkv.unbind(3), partition, bias, scale)

    inputs = [qkv, bias] if biased else [qkv]
    assert_contract(packed(attend), packed(reference), inputs, cotangent, dtype, tables=[1], device=device)


SHAPES = {  # partition, height, width
    "N=1": (Partition.window(1), 3, 4),
    "N=15": (Partition.window((3, 5)), 6, 5),
    "N=16": (Partition.window(4), 8, 4),
    "N=17": (Partition.window((1, 17)), 2, 17),
    "N=49": (Partition.window(7), 7, 14),
    "N=63": (Partition.window((7, 9)), 7, 9),
    "N=64": (Partition.window(8), 8, 16),
    "N=65": (Partition.window((5, 13)), 5, 13),
    "N=100": (Partition.window(10), 10, 20),
    "N=144": (Partition.window(12), 12, 12),
    "window on a map that does not divide": (Partition.window((4, 3)), 9, 10),
    "dilated": (Partition.long(3, 2), 12, 6),
    "dilated, groups wholly outside": (Partition.long(3, (2, 4)), 7, 13),
    "grid": (Partition.grid((3, 4)), 8, 9),
    "stripes": (Partition.stripes(2), 3, 11),
    "shifted": (Partition.window(4, 2), 8, 12),
    "shifted on one axis, ragged on the other": (Partition((4, 3), 1, (1, 0)), 8, 10),
    "shifted and dilated": (Partition((2, 3), (3, 2), (4, 1)), 12, 6),
    "streamed, dilated, ragged": (Partition.long((9, 8), 2), 13, 9),
    "streamed, shifted": (Partition.window((9, 8), (4, 3)), 9, 8),
    "streamed rectangle": (Partition.stripes(40), 40, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, device):
    check(*SHAPES[shape][:1], 1, *SHAPES[shape][1:], 1, 16, dtype, device)


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize("shape", ["N=15", "N=17", "N=65", "dilated, groups wholly outside", "streamed, shifted"])
def test_shapes_in_float64(shape, device):
    check(*SHAPES[shape][:1], 1, *SHAPES[shape][1:], 1, 8, torch.float64, device)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 72, 96, 128])
def test_head_dims(head_dim, device):
    check(Partition.window(4), 1, 4, 8, 2, head_dim, torch.float16, device)
    check(Partition.window(9), 1, 9, 9, 1, head_dim, torch.float32, device)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
@pytest.mark.parametrize("biased", [False, True])
def test_scales(scale, biased, device):
    check(Partition.window(4), 2, 4, 8, 3, 16, torch.float32, device, scale, biased)
    check(Partition.window(9), 1, 9, 9, 2, 16, torch.float32, device, scale, biased)


@pytest.mark.parametrize("side", [3, 9])
def test_strides(side, device):
    """q, k, v and the output gradient each with strides of their own, rows not aligned; nothing is copied."""
    partition = Partition.window(side)
    qkv, bias, dout = (x.float().to(device) for x in random_inputs(partition, 2, side, side, 2, 16))
    q, k, v = qkv.unbind(3)
    geometry = geometry_of(partition, side, side)
    plain = [x.contiguous() for x in (q, k, v, dout)]
    wide = q.new_zeros(2, side, side, 2, 19)
    wide[..., 1:17] = q
    odd = [wide[..., 1:17], k.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4), v]
    odd.append(dout.transpose(1, 2).contiguous().transpose(1, 2))
    results = []
    for *inputs, do in (plain, odd):
        out, statistic = kernels.partition_attention_forward(*inputs, bias, [], False, geometry, 0.25)
        results.append(
            [out, *kernels.partition_attention_backward(do, *inputs, bias, [], False, statistic, geometry, 0.25)]
        )
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_hot_softmax_gathers_exactly(device):
    """Every token attends to the token that follows it in its group, and to nothing else: out is a gather of v."""
    partition, tokens = Partition.window(4), 16
    v = torch.arange(4 * 8 * 16, dtype=torch.float32, device=device).view(1, 4, 8, 1, 16)
    code = torch.eye(tokens, device=device)[None, None].expand(1, 2, -1, -1)  # [B, groups, N, D]
    q = partition.merge(code.roll(1, -1)[..., None, :].contiguous(), 4, 8)
    k = partition.merge(code[..., None, :].contiguous(), 4, 8)
    out = attend(q, k, v, partition, None, 1e4)
    assert torch.equal(partition.split(out), partition.split(v).roll(-1, 2))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("group", [(7, 7), (3, 5)])
def test_inline_position_bias(group, residual, device):
    """The MLP evaluated inside the kernel is its table passed in."""
    width, heads = 6, 2
    partition = Partition.window(group)
    qkv, _, dout = (x.float().to(device) for x in random_inputs(partition, 2, *group, heads, 16))
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, 2), (width,), *[(width,), (width,), (width, width), (width,)] * 2]
    shapes += [(width,), (width,), (heads, width), (heads,)]
    mlp = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    table = dynamic_position_bias(mlp, group, residual)
    geometry = geometry_of(partition, *group)
    results = []
    for bias, weights in ((table, []), (None, mlp)):
        call = *qkv.unbind(3), bias, weights, residual
        out, statistic = kernels.partition_attention_forward(*call, geometry, 0.25)
        dqkv, dbias = kernels.partition_attention_backward(dout, *call, statistic, geometry, 0.25)
        results.append([out, dqkv, dbias])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_inline_refuses_streamed_groups(device):
    qkv = torch.zeros(1, 9, 9, 3, 1, 16, device=device)
    with pytest.raises(ValueError, match="at most 64 tokens, got 81"):
        kernels.partition_attention_forward(*qkv.unbind(3), None, [qkv] * 14, False, (9, 9, 1, 1, 0, 0), 1.0)


def test_refusals():
    assert "head_dim 136 > 128" in kernels.refusal(136, torch.float32)
    assert "not a multiple of 8" in kernels.refusal(20, torch.float32)
    assert kernels.refusal(72, torch.bfloat16) is None
    assert (kernels.refusal(32, torch.float64) is None) == INTERPRETED


@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 0, 8)])
def test_empty(shape, device):
    qkv, bias = torch.zeros(*shape, 3, 2, 16, device=device), torch.zeros(2, 7, 7, device=device)
    call = *qkv.unbind(3), bias, [], False
    out, statistic = kernels.partition_attention_forward(*call, (4, 4, 1, 1, 0, 0), 1.0)
    dqkv, dbias = kernels.partition_attention_backward(out, *call, statistic, (4, 4, 1, 1, 0, 0), 1.0)
    assert out.shape == (*shape, 2, 16) and dqkv.shape == qkv.shape and torch.equal(dbias, bias)


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize(
    "partition, side", [(Partition.window(2, 1), 4), (Partition.long(2, 2), 5), (Partition.window((5, 13)), 13)]
)
def test_gradcheck(partition, side):
    qkv, bias, _ = random_inputs(partition, 1, 5 if side == 13 else side, side, 1, 8)
    leaves = [qkv.requires_grad_(), bias.requires_grad_()]
    torch.autograd.gradcheck(
        lambda qkv, bias: attend(*qkv.unbind(3), partition, bias, None),
        leaves,
        fast_mode=True,
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("side", [4, 9])
def test_same_bits_every_run(side, device):
    partition = Partition.window(side)
    qkv, bias, dout = (x.float().to(device) for x in random_inputs(partition, 1, 2 * side, side, 1, 16))
    runs = []
    for _ in range(2 if INTERPRETED else 20):
        leaves = [qkv.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = attend(*leaves[0].unbind(3), partition, leaves[1], None)
        runs.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@pytest.mark.parametrize("filling", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLIND)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_blind_queries(case, dtype, filling, device):
    def blindly(q, k, v, partition, bias):
        return attend(*(x.to(device) for x in (q, k, v)), partition, bias.to(device), None)

    results, qkv = attend_blindly(*BLIND[case], dtype, filling, blindly)
    assert_blind(results, qkv, filling)


def test_the_lowest_bias_gives_no_weight_to_places_outside(device):
    for partition in (Partition.window(7), Partition.window((9, 10))):
        ones = torch.ones(1, 8, 8, 1, 8, device=device)
        gh, gw = partition.group
        bias = torch.full((1, 2 * gh - 1, 2 * gw - 1), torch.finfo(torch.float32).min, device=device)
        torch.testing.assert_close(attend(ones, ones, ones, partition, bias, None), ones)


@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
@pytest.mark.parametrize("partition", [Partition.window(4), Partition.long((9, 8), 2)], ids=["tile", "streamed"])
def test_nan_stays_in_its_group(partition, poisoned, device):
    height, width = (9, 8) if partition.group[0] == 4 else (13, 9)
    qkv, _, dout = (x.float().to(device) for x in random_inputs(partition, 1, height, width, 1, 16))
    qkv[0, 1, 1, "qkv".index(poisoned)] = float("nan")
    leaf = qkv.requires_grad_()
    out = attend(*leaf.unbind(3), partition, None, None)
    (gradient,) = torch.autograd.grad(out, leaf, dout)
    index = partition.index(height, width)
    group = index[(index == width + 1).any(1)].flatten()
    elsewhere = torch.ones(height * width, dtype=torch.bool)
    elsewhere[group[group >= 0]] = False
    assert out.view(height * width, -1)[elsewhere].isfinite().all()
    assert gradient.view(height * width, -1)[elsewhere].isfinite().all()
    assert out.view(height * width, -1)[~elsewhere].isnan().any()


@triton.jit
def _write_tokens(p_index, p_wrapped, geometry, BLOCK: tl.constexpr):
    group, o_token = tl.program_id(0), tl.arange(0, BLOCK)
    tokens = group_tokens(o_token, group_start(group, geometry), geometry)
    index = tl.where(tokens.inside, tokens.y * geometry.width + tokens.x, -1)
    tl.store(p_index + group * BLOCK + o_token, index)
    tl.store(p_wrapped + group * BLOCK + o_token, tl.where(tokens.inside, tokens.wrapped, 0))


@pytest.mark.parametrize("partition, height, width", random_partitions(40))
def test_index_map(partition, height, width, device):
    """The jitted map lists the groups of Partition.index that are not wholly outside, each once, in its own order."""
    geometry = Geometry.of(height, width, *geometry_of(partition, height, width))
    groups, tokens = geometry.starts_y * geometry.starts_x, partition.tokens
    index = torch.empty(groups, 64, dtype=torch.int32, device=device)
    wrapped = torch.empty_like(index)
    _write_tokens[(groups,)](index, wrapped, geometry, BLOCK=64)
    assert (index[:, tokens:] == -1).all()
    expected = partition.index(height, width)
    over = partition.wrapped(height, width).int()
    inside = (expected >= 0).any(1)
    expected, over = expected[inside], (over @ torch.tensor([2, 1], dtype=torch.int32))[inside]
    ours = zip(index[:, :tokens].tolist(), wrapped[:, :tokens].tolist())
    assert sorted(ours) == sorted(zip(expected.tolist(), over.tolist()))


@pytest.mark.parametrize(
    "strides", [(2**31 + 8, 128, 32, 16), (512, 2**30, 32, 16), (512, 128, 2**30 + 8, 16), (512, 128, 32, 2**31)]
)
@pytest.mark.parametrize("group", [(3, 3), (9, 8)])
def test_addresses_past_2_31_elements(group, strides, device):
    partition, shape = Partition.long(group, 1), (2, 3, 3, 2, 8)
    draw = torch.Generator().manual_seed(0)
    near = [torch.randn(shape, generator=draw).half().to(device) for _ in range(4)]
    far = []
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(shape, (*strides, 1))), device)
        far.append(storage.as_strided(shape, (*strides, 1)).copy_(x))
    geometry, results = geometry_of(partition, 3, 3), []
    for *qkv, dout in (near, far):
        out, statistic = kernels.partition_attention_forward(*qkv, None, [], False, geometry, 0.3)
        dqkv, _ = kernels.partition_attention_backward(dout, *qkv, None, [], False, statistic, geometry, 0.3)
        results.append((out, dqkv))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(not INTERPRETED, reason="page protection is the CPU's")
def test_reads_stay_inside_the_tensors():
    """Tensors that end on an inaccessible page: a lane beyond the end would kill the process."""
    assert_exits_well("guard_pages.py")
