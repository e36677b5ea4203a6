"""lsda_attention with a dynamic position bias: both forms, every weight's gradient, the choice between them."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_triton
from contract import assert_contract

import vitkernels
from vitkernels import DynamicPositionBias, Partition, lsda_attention, partition_attention_qkvpacked

cpu = pytest.param(
    "cpu", "table", marks=pytest.mark.skipif(not vitkernels._native.cpu.available, reason=vitkernels._native.cpu.reason)
)
table, inline = (pytest.param("triton", form, marks=needs_triton) for form in ("table", "inline"))


def functional(position_bias, group_size, interval, backend, form):
    """lsda_attention as a function of qkv and the 14 weights of ``position_bias``."""
    names = [name for name, _ in position_bias.named_parameters()]

    def call(qkv, *weights):
        class Bound(torch.nn.Module):
            def forward(self, qkv):
                return lsda_attention(
                    qkv, position_bias, group_size=group_size, interval=interval, backend=backend, form=form
                )

        bound = Bound()
        bound.pos = position_bias
        return torch.func.functional_call(bound, {f"pos.{n}": w for n, w in zip(names, weights)}, (qkv,))

    return call


# dim, heads, height, width, group_size, interval, residual
CASES = [
    (96, 2, 7, 8, 7, 1, False),
    (192, 3, 9, 5, 4, 2, True),
    (128, 2, 6, 8, (3, 4), (2, 1), False),
    (384, 12, 4, 4, 4, 1, False),
    (96, 2, 5, 8, None, (2, 3), False),
]


@pytest.mark.parametrize("dim, heads, height, width, group_size, interval, residual", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend, form", [cpu, table, inline])
def test_contract(dim, heads, height, width, group_size, interval, residual, dtype, backend, form, device):
    if backend == "triton" and device == "cpu" and (dtype != torch.float32) == (dim != 192):
        pytest.skip("the interpreter takes seconds: one case in bfloat16, the others in float32")
    torch.manual_seed(0)
    device = "cpu" if backend == "cpu" else device
    module = DynamicPositionBias(dim, heads, residual=residual).double()
    weights = [torch.randn_like(p) * 0.5 + (p.detach() if p.dim() == 1 else 0) for p in module.parameters()]
    qkv = torch.randn(2, height, width, 3, heads, 16, dtype=torch.float64)
    cotangent = torch.randn(2, height, width, heads, 16, dtype=torch.float64)
    ours = functional(module, group_size, interval, backend, form)
    reference = functional(module, group_size, interval, "reference", "table")
    # softmax ignores a constant, so that the last bias has no gradient: the scale is its weight's
    places = dict(tables=range(1, 15), together=range(1, 15), vanishing={14: 13})
    assert_contract(ours, reference, [qkv, *weights], cotangent, dtype, **places, device=device)


@needs_triton
def test_gradcheck_inline():
    if torch.cuda.is_available():
        pytest.skip("float64 runs in the interpreter only")
    torch.manual_seed(0)
    module = DynamicPositionBias(32, 1, residual=True).double()
    weights = [torch.randn_like(p).requires_grad_() for p in module.parameters()]
    qkv = torch.randn(1, 3, 2, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    call = functional(module, 2, 1, "triton", "inline")
    assert torch.autograd.gradcheck(call, [qkv, *weights], fast_mode=True)


@needs_triton
def test_both_forms_agree_and_repeat_bit_for_bit(device):
    module = DynamicPositionBias(96, 3).to(device)
    qkv = torch.randn(1, 7, 8, 3, 3, 32, device=device)
    results = [lsda_attention(qkv, module, backend="triton", form=form) for form in ("table", "inline", "inline")]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1], results[2])


def test_a_module_and_its_table_give_the_same():
    module = DynamicPositionBias(96, 3)
    qkv = torch.randn(2, 14, 15, 3, 3, 32)
    expected = partition_attention_qkvpacked(qkv, Partition.long(7, 2), module((7, 7)))
    assert torch.equal(lsda_attention(qkv, module, group_size=7, interval=2), expected)


def test_a_group_larger_than_the_map_evaluates_the_offsets_of_the_map_alone():
    module, qkv = DynamicPositionBias(96, 3), torch.randn(1, 5, 6, 3, 3, 32)
    expected = lsda_attention(qkv, module, group_size=(5, 6))
    assert torch.equal(lsda_attention(qkv, module, group_size=10**6), expected)
    assert lsda_attention(qkv[:, :0], module, group_size=10**6).shape == (1, 0, 6, 3, 32)


@needs_triton
def test_inline_refuses_what_it_cannot_do(device):
    module = DynamicPositionBias(96, 3).to(device)
    qkv = torch.randn(1, 10, 10, 3, 3, 32, device=device)
    with pytest.raises(RuntimeError, match="at most 64 tokens; got backend 'triton' and 100 tokens. Use form='table'"):
        lsda_attention(qkv, module, group_size=10, backend="triton", form="inline")
    with pytest.raises(RuntimeError, match="got backend 'reference'"):
        lsda_attention(qkv, module, backend="reference", form="inline")
    with pytest.raises(ValueError, match="form must be 'auto', 'table' or 'inline', got 'fast'"):
        lsda_attention(qkv, module, backend="triton", form="fast")


def test_refusals():
    qkv = torch.randn(1, 7, 7, 3, 3, 32)
    with pytest.raises(TypeError, match="position_bias must be a DynamicPositionBias, a table or None, got Linear"):
        lsda_attention(qkv, torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match="position_bias is for 4 heads, qkv has 3"):
        lsda_attention(qkv, DynamicPositionBias(128, 4))


def test_compile_with_a_module():
    torch.compiler.reset()
    module = DynamicPositionBias(64, 2)
    qkv = torch.randn(1, 9, 10, 3, 2, 16)

    def layer(qkv):
        return lsda_attention(qkv, module, group_size=4, interval=2)

    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(qkv), layer(qkv))
