"""The Triton kernels of pooled attention against the reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import functools
import itertools
import math
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

from vitkernels import pooled_attention
from vitkernels.pooled_attention import kernels, positions
from vitkernels.pooled_attention.positions import Divisor, Layout, _divide, one_hot

INTERPRETED = bool(triton.knobs.runtime.interpret)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_inputs(q_thw, k_thw, cls: int, heads: int, head_dim: int, batch: int = 1) -> list[Tensor]:
    """q, k, v and output gradient in float64."""
    queries, keys = math.prod(q_thw) + cls, math.prod(k_thw) + cls
    return [draw(batch, n, heads, head_dim, seed=i) for i, n in enumerate((queries, keys, keys, queries))]


def random_positions(q_thw, k_thw, head_dim: int, device: str, wanted=(True, True, True)) -> list[Tensor | None]:
    """Float32 tables [length, head_dim] of a volume's axes, None where unwanted, and for every pair a random row."""
    lengths = [n if want else None for *n, want in zip(q_thw, k_thw, wanted)]
    tables = [n and (draw(sum(n), head_dim, seed=9) / head_dim**0.5).float().to(device) for n in lengths]
    return [*tables, *(n and torch.randint(sum(n), n).to(device) for n in lengths)]


def check(
    q_thw, k_thw, cls=0, heads=1, head_dim=16, dtype=torch.float32, device="cpu", batch=1, wanted=(1, 1, 1), longer=0,
    **arguments,
) -> None:  # fmt: skip
    """The numerical contract for the output and every gradient; q, k and v are thirds of packed tensors."""
    q, k, v, cotangent = random_inputs(q_thw, k_thw, cls, heads, head_dim, batch)
    wanted = wanted[-len(q_thw) :]
    lengths = [2 * max(a, b) - 1 + longer for a, b in zip(q_thw, k_thw)]
    tables = [draw(n, head_dim, seed=i) / head_dim**0.5 for i, n in enumerate(lengths) if wanted[i]]
    there = [n for n, want in zip(k_thw, wanted) if want]
    vanishing = {} if cls else {i: 0 for i, n in enumerate(there, 3) if n == 1}  # one number more for all keys
    if k.shape[1] == 1:  # whose weight is always 1
        vanishing = dict.fromkeys((0, 1, *vanishing), 2)
    arguments |= dict(q_thw=q_thw, k_thw=k_thw, has_cls=bool(cls))

    def attend(q, k, v, *tables, backend):
        q, (k, v) = torch.stack((q, q, q), 2)[:, :, 1], torch.stack((k, v), 2).unbind(2)
        tables = iter(tables)
        rel_pos = [next(tables) if want else None for want in wanted]
        return pooled_attention(q, k, v, rel_pos=rel_pos, backend=backend, **arguments)

    assert_contract(
        functools.partial(attend, backend="triton"), functools.partial(attend, backend="reference"),
        [q, k, v, *tables], cotangent, dtype, tables=range(3, 6), vanishing=vanishing, device=device,
    )  # fmt: skip


def run(q, k, v, dout, positions, q_thw, k_thw, cls, residual=1, scale=0.3) -> list[Tensor]:
    """The launchers: out, the gradients of q, k, v and of the tables."""
    geometry = q_thw, k_thw, bool(cls), residual, scale
    out, statistic = kernels.pooled_attention_forward(q, k, v, *positions, *geometry)
    return [out, *kernels.pooled_attention_backward(dout, q, k, v, *positions, statistic, *geometry)]


SHAPES = {  # maps of queries and of keys, class token, wanted tables
    "one token": ((1, 1), (1, 1), 0),
    "equal maps": ((3, 4), (3, 4), 1),
    "ratio 2": ((4, 2), (2, 1), 0),
    "ratio 3/2": ((6, 3), (4, 2), 1),
    "more keys than queries": ((2, 3), (5, 4), 0),
    "volumes": ((2, 3, 2), (2, 2, 1), 1),
    "volumes of other times": ((2, 2, 3), (3, 1, 2), 0),
    "63 queries": ((7, 9), (2, 2), 0, (0, 1, 0)),
    "64 queries": ((4, 16), (2, 2), 0, (0, 1, 0)),
    "65 queries": ((4, 16), (2, 2), 1, (0, 1, 0)),
    "31 keys": ((2, 2), (6, 5), 1),
    "32 keys": ((2, 2), (4, 8), 0),
    "33 keys": ((2, 2), (4, 8), 1),
    "63 keys": ((2, 2), (7, 9), 0, (0, 0, 1)),
    "64 keys": ((2, 2), (7, 9), 1, (0, 0, 1)),
    "65 keys": ((2, 2), (13, 5), 0, (0, 0, 1)),
    "129 columns, in two parts": ((2, 1), (2, 127), 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, device):
    """Two images and heads: of fewer queries the largest errors, ours and the reference's, are a matter of chance."""
    q_thw, k_thw, cls, *wanted = SHAPES[shape]
    check(q_thw, k_thw, cls, 2, device=device, batch=2, wanted=wanted[0] if wanted else (1, 1, 1))


@pytest.mark.parametrize("keys", [(3, 13), (4, 13), (2, 40)])
def test_columns_in_parts(keys, device, monkeypatch):
    """One part that is full, two, and an axis that begins in one part and ends in the third."""
    monkeypatch.setattr(positions, "WIDEST", 16)
    check((2, 1), keys, 1, device=device)


@pytest.mark.parametrize("shape", ["ratio 3/2", "volumes", "33 keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(shape, dtype, device):
    check(*SHAPES[shape], head_dim=32, dtype=dtype, device=device, residual="all_but_cls")


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
@pytest.mark.parametrize("shape", ["ratio 3/2", "volumes", "33 keys"])
def test_float64(shape):
    check(*SHAPES[shape], dtype=torch.float64, residual="all")


@pytest.mark.parametrize("head_dim", [8, 24, 72, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(head_dim, dtype, device):
    check((3, 2), (2, 3), 1, 2, head_dim, dtype, device, wanted=(0, 1, 0))


@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("residual", ["none", "all", "all_but_cls"])
def test_residuals(residual, cls, device):
    check((2, 3), (2, 2), cls, 2, 8, device=device, residual=residual)


@pytest.mark.parametrize("wanted", [*itertools.product((0, 1), repeat=3)], ids=str)
def test_tables_that_are_left_out(wanted, device):
    check((2, 1, 3), (2, 2, 1), 1, wanted=wanted, device=device)


@pytest.mark.parametrize("longer", [-2, 3])
def test_interpolated_tables(longer, device):
    check((3, 2), (2, 3), longer=longer, device=device)


@pytest.mark.parametrize("index", ["slowfast", "torchvision"])
def test_index_of_other_libraries(index, device):
    check((3, 8), (2, 6), index=index, device=device)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_images_and_scales(scale, device):
    check((2, 3), (2, 2), 1, 2, 8, device=device, batch=3, scale=scale)


def test_large_logits(device):
    """The log-sum-exp is rounded by so much that the weights do not sum to 1; the gradients do not show it."""
    check((4, 5), (3, 4), head_dim=24, device=device, scale=2.0)


def test_few_tiles_of_keys(device):
    """Every program of the key kernel takes a share of the queries; more tiles than processors, all of them."""
    q, k = torch.empty(1, 100, 1, 16, device=device), torch.empty(1, 4, 1, 16, device=device)
    assert kernels._share(q, k, 4) < 100 <= kernels._share(q, k.expand(10000, -1, -1, -1), 4)
    check((4, 25), (2, 2), wanted=(0, 1, 0), device=device)
    check((10, 10), (2, 2), wanted=(0, 0, 0), device=device, batch=3)


def test_strides(device):
    """Rows that are not aligned, strides of all kinds; nothing is copied."""
    maps = (1, 2, 3), (1, 3, 2), 1
    plain = [x.float().to(device) for x in random_inputs(*maps, 2, 8)]
    positions = random_positions(*maps[:2], 8, device)
    q, k, v, dout = plain
    wide = q.new_zeros(*q.shape[:3], 11)
    wide[..., 1:9] = q
    odd = [wide[..., 1:9], k.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((v, v), 2)[:, :, 1]]
    odd.append(dout[:, :, :1].expand(-1, -1, 2, -1))
    plain[3] = odd[3].contiguous()
    for a, b in zip(run(*odd, positions, *maps), run(*plain, positions, *maps)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_blind_query(device):
    inputs = [x.to(device) for x in blind_inputs(1, 36, 2, 8)]
    thw = (1, 6, 6)
    out, dq, dk, dv, *_ = run(*inputs, inputs[2], [None] * 6, thw, thw, 0, residual=0)
    assert_blind(out, dq, dk, dv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_hot_softmax_gathers_exactly(dtype, device):
    """By its tables every query attends to the key at its place in a map of half the size, and to nothing else."""
    q, k = torch.zeros(1, 33, 1, 16), torch.zeros(1, 9, 1, 16)
    q[:, 1:, :, 0], q[:, :1, :, 1], k[:, :1, :, 1] = 1, 100, 100  # class tokens meet
    table = [torch.zeros(n, 16) for n in (15, 7)]
    for x, n in zip(table, (4, 2)):
        x[2 * (n - 1) : 2 * n, 0] = 1e4
    generator = torch.Generator().manual_seed(0)
    v, dout = (torch.randint(-8, 9, (1, n, 1, 16), generator=generator).float() for n in (9, 33))
    y, x = torch.arange(8)[:, None] // 2, torch.arange(4) // 2
    chosen = torch.cat((torch.zeros(1, dtype=torch.long), (1 + y * 2 + x).flatten()))
    leaves = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
    tables = [x.to(device).requires_grad_() for x in table]
    out = pooled_attention(
        *leaves, q_thw=(8, 4), k_thw=(4, 2), rel_pos=tables, has_cls=True, residual="all_but_cls", scale=1.0,
        backend="triton",
    )  # fmt: skip
    out.backward(dout.to(device, dtype))
    residual = q.clone()
    residual[:, 0] = 0
    assert torch.equal(out.detach().cpu().float(), v[:, chosen] + residual)
    dq, dk, dv = (x.grad.cpu().float() for x in leaves)
    assert torch.equal(dv, torch.zeros_like(v).index_add_(1, chosen, dout))
    dout[:, 0] = 0
    assert torch.equal(dq, dout) and not dk.any() and not any(x.grad.any() for x in tables)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poisoned", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_image_and_head(poisoned, device):
    maps = (1, 2, 2), (1, 2, 3), 1
    inputs = [x.float().to(device) for x in random_inputs(*maps, 2, 8, batch=2)]
    positions = random_positions(*maps[:2], 8, device)
    inputs[("q", "k", "v", "dout").index(poisoned)][0, 3, 1] = float("nan")
    out, *gradients = (x.cpu() for x in run(*inputs, positions, *maps)[:4])
    for x in (out, *gradients):
        assert x[1].isfinite().all() and x[0, :, 0].isfinite().all()
    assert any(x[0, :, 1].isnan().any() for x in (out, *gradients))


@pytest.mark.skipif(not INTERPRETED, reason="the compiled kernels have no float64")
def test_gradcheck():
    q_thw, k_thw, cls = (1, 2, 2), (2, 1, 3), 1
    inputs = random_inputs(q_thw, k_thw, cls, 1, 8)[:3]
    inputs += [draw(2 * max(a, b) - 1, 8) for a, b in zip(q_thw, k_thw)]

    def attend(q, k, v, *rel_pos):
        return pooled_attention(
            q, k, v, q_thw=q_thw, k_thw=k_thw, rel_pos=rel_pos, has_cls=bool(cls), residual="all", backend="triton"
        )

    inputs = [x.requires_grad_() for x in inputs]
    torch.autograd.gradcheck(attend, inputs, fast_mode=True, check_undefined_grad=False)


def test_same_bits_every_run(device):
    maps = (1, 3, 22), (1, 3, 4), 1
    inputs = [x.float().to(device) for x in random_inputs(*maps, 1, 16)]
    positions = random_positions(*maps[:2], 16, device, (False, True, False))
    first, *others = (run(*inputs, positions, *maps) for _ in range(2 if INTERPRETED else 20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("wanted", [(0, 0, 0), (0, 1, 1)], ids=str)
def test_empty_batch(wanted, device):
    maps = (1, 5, 4), (1, 3, 4), 0
    inputs = [x.float().to(device) for x in random_inputs(*maps, 2, 16, batch=0)]
    positions = random_positions(*maps[:2], 16, device, wanted)
    out, dq, dk, dv, *dtables = run(*inputs, positions, *maps)
    assert [x.shape for x in (out, dq, dk, dv)] == [inputs[i].shape for i in (0, 0, 1, 1)]
    assert [x.shape for x in dtables] == [(0,) if x is None else x.shape for x in positions[:3]]
    assert not any(x.any() for x in dtables)


@pytest.mark.parametrize("wanted", [(0, 0, 0), (1, 0, 1)], ids=str)
def test_opcheck(wanted, device):
    maps = (2, 1, 2), (1, 2, 2), 1
    q, k, v, dout = (x.half().to(device) for x in random_inputs(*maps, 1, 8))
    positions = random_positions(*maps[:2], 8, device, wanted)
    suffix, geometry = "_interpreted" if INTERPRETED else "", (*maps[:2], True, 2, 0.3)
    forward, backward = (
        getattr(torch.ops.vitkernels, f"pooled_attention_{name}{suffix}").default for name in ("forward", "backward")
    )
    statistic = forward(q, k, v, *positions, *geometry)[1]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (q, k, v, *positions, *geometry), test_utils=utilities)
    torch.library.opcheck(backward, (dout, q, k, v, *positions, statistic, *geometry), test_utils=utilities)


@pytest.mark.parametrize(
    "batch, heads, strides",
    [
        (3, 1, (2**30 + 8, 8, 0)),  # a stride of 32 bits, a product of more
        (1, 1, (0, 2**29 + 8, 0)),
        (1, 2, (0, 16, 2**31)),
    ],
)
def test_addresses_past_2_31_elements(batch, heads, strides, device):
    maps = (1, 1, 3), (1, 2, 2), 0
    near, far = [x.half().to(device) for x in random_inputs(*maps, heads, 8, batch)], []
    positions = random_positions(*maps[:2], 8, device, (False, False, True))
    for x in near:
        storage = sparse(1 + sum((n - 1) * stride for n, stride in zip(x.shape, (*strides, 1))), device)
        far.append(storage.as_strided(x.shape, (*strides, 1)).copy_(x))
    assert all(torch.equal(a, b) for a, b in zip(run(*far, positions, *maps), run(*near, positions, *maps)))


@pytest.mark.skipif(not INTERPRETED, reason="page protection is the CPU's")
def test_no_lane_leaves_the_tensors():
    """Tensors between inaccessible pages: a lane outside kills the process."""
    assert_exits_well("pooled_guard_pages.py")


@triton.jit
def _write_quotients(p_numbers, divisor, BLOCK: tl.constexpr):
    p_numbers += tl.arange(0, BLOCK)
    tl.store(p_numbers, _divide(tl.load(p_numbers), divisor))


def test_division_by_a_product(device):
    generator = random.Random(0)
    for by in (
        1,
        2,
        3,
        5,
        7,
        14,
        196,
        2**20 + 1,
        2**29 + 1,
        2**30 - 1,
        *(generator.randint(1, 2**30) for _ in range(8)),
    ):
        near = [i * by + j for i in (0, 1, 2**30 // by - 1, 2**30 // by) for j in (-1, 0, 1)]
        numbers = [min(max(n, 0), 2**30 - 1) for n in near + [generator.randrange(2**30) for _ in range(52)]]
        found = torch.tensor(numbers, dtype=torch.int32, device=device)
        _write_quotients[(1,)](found, Divisor.of(by), BLOCK=64)
        assert found.tolist() == [n // by for n in numbers]


@triton.jit
def _write_one_hot(p_taken, columns, BLOCK: tl.constexpr):
    o_key, o_column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_taken + o_key * BLOCK + o_column, one_hot(o_key, o_column, columns, tl.float32))


@pytest.mark.parametrize("wanted", [*itertools.product((0, 1), repeat=3)][1:], ids=str)
@pytest.mark.parametrize("cls", [0, 1])
def test_one_hot_keys(wanted, cls, device):
    """Key (t, y, x) takes column t of the first axis, y of the next and x of the last; the class token none."""
    k_thw = (3, 4, 5)
    terms = [torch.empty(2, n, 8) if want else None for n, want in zip(k_thw, wanted)]
    taken = torch.empty(64, 64, device=device)
    _write_one_hot[(1,)](taken, Layout.of(terms, (2, 2, 2), k_thw, bool(cls), 1).columns, BLOCK=64)
    places = [torch.eye(n) for n, want in zip(k_thw, wanted) if want]
    grid = itertools.product(*(torch.eye(n) if want else [torch.zeros(0)] * n for n, want in zip(k_thw, wanted)))
    expected = torch.zeros(64, 64)
    for key, row in enumerate(map(torch.cat, grid), cls):
        expected[key, : sum(map(len, places))] = row
    assert torch.equal(taken.cpu()[: 60 + cls], expected[: 60 + cls])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "q_thw, k_thw, cls, heads, head_dim",
    [
        ((56, 56), (14, 14), 0, 1, 96),
        ((28, 28), (14, 14), 0, 2, 96),
        ((14, 14), (14, 14), 0, 4, 96),
        ((7, 7), (7, 7), 0, 8, 96),
        ((8, 14, 14), (8, 7, 7), 1, 4, 96),
        ((8, 7, 7), (8, 14, 14), 1, 8, 96),
        ((20, 10, 10), (20, 10, 10), 1, 2, 72),
        ((32, 32), (16, 16), 0, 2, 64),
        ((16, 70), (16, 70), 0, 1, 128),
    ],
)
def test_published_shapes(q_thw, k_thw, cls, heads, head_dim, dtype, device):
    check(q_thw, k_thw, cls, heads, head_dim, dtype, device, batch=2, residual="all_but_cls")


def test_refusals():
    assert "head_dim 136 > 128" in kernels.refusal(136, torch.float32)
    assert "not a multiple of 8" in kernels.refusal(20, torch.float32)
    assert (kernels.refusal(32, torch.float64) is None) == INTERPRETED
