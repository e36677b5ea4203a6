"""The dynamic position bias: published outputs, every backend against the reference, the kept table."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import TRITON_REFUSAL
from contract import assert_contract
from torch import nn

import vitkernels
from vitkernels import DynamicPositionBias, dynamic_position_bias
from vitkernels.position_bias.reference import dynamic_position_bias as reference

native = pytest.mark.skipif(not vitkernels._native.cpu.available, reason=str(vitkernels._native.cpu.reason))
cpu = pytest.param("cpu", marks=native)
triton = pytest.param("triton", marks=pytest.mark.skipif(TRITON_REFUSAL is not None, reason=str(TRITON_REFUSAL)))
backends = pytest.mark.parametrize("backend", [cpu, triton])


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def weights(hidden: int, heads: int, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    """The 14 parameters."""
    torch.manual_seed(seed)
    middle = [(hidden,), (hidden,), (hidden, hidden), (hidden,)]
    shapes = [(hidden, 2), (hidden,), *middle, *middle, (hidden,), (hidden,), (heads, hidden), (heads,)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def table_of(mlp, group, residual, backend):
    return dynamic_position_bias(mlp, group, residual=residual, backend=backend)


@pytest.fixture
def few_programs(monkeypatch):
    """So few Triton programs that each takes several blocks of offsets."""
    if TRITON_REFUSAL is None:
        monkeypatch.setattr("vitkernels.position_bias.kernels.PROGRAMS", 2)


# The reference, on the published module's outputs


@pytest.mark.parametrize("name", ["dpb_g7", "dpb_g3x5"])
@pytest.mark.parametrize("backend", ["reference", cpu, triton])
def test_golden(golden, name, backend):
    meta, tensors = golden(name)
    group, heads = tuple(meta["config"]["group"]), meta["config"]["heads"]
    module = DynamicPositionBias(meta["config"]["dim"], heads)
    module.load_state_dict({key[3:]: x for key, x in tensors.items() if key.startswith("sd.")})
    module = module.to(device_of(backend))

    table = module(group, backend=backend)
    rows = table.flatten(1).t().cpu()
    tolerance = meta["recommended_tol"]
    torch.testing.assert_close(rows, tensors["out"], rtol=0, atol=tolerance["out_atol"]["out"])

    index = torch.arange(group[0] * group[1])
    y, x = index // group[1], index % group[1]
    gathered = table.cpu()[:, y[:, None] - y + group[0] - 1, x[:, None] - x + group[1] - 1]
    torch.testing.assert_close(gathered, tensors["aux.bias"], rtol=0, atol=tolerance["out_atol"]["aux.bias"])

    (rows * tensors["cot"]).sum().backward()
    for key, parameter in module.named_parameters():
        expected = tensors[f"grad.sd.{key}"]
        error = (parameter.grad.cpu() - expected).abs().max()
        assert error <= tolerance["grad_rel_to_max"] * expected.abs().max(), key


# Backends


# hidden width: heads, group
SHAPES = {1: (1, (2, 3)), 2: (2, (4, 2)), 6: (3, (3, 3)), 12: (17, (1, 4)), 24: (12, (3, 2)), 48: (24, (2, 2))}


@backends
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("hidden", SHAPES)
def test_contract(backend, hidden, residual):
    """Over several draws: the largest error of a handful of numbers is too much a matter of luck."""
    heads, group = SHAPES[hidden]
    if backend == "cpu":
        group = (7, 7)
    draws = [weights(hidden, heads, seed=seed) for seed in range(8 if backend == "cpu" else min(8, 48 // hidden))]
    # LayerNorm maps two numbers to 1 and -1, but for eps: what stands before the last one has next to no gradient
    blocked = range(10) if hidden <= 2 else ()
    torch.manual_seed(0)

    def over_draws(function):
        return lambda *mlp: torch.stack([function(parameters) for parameters in zip(*mlp)])

    assert_contract(
        over_draws(lambda mlp: table_of(mlp, group, residual, backend)),
        over_draws(lambda mlp: reference(mlp, group, residual)),
        [torch.stack(parameter) for parameter in zip(*draws)],
        torch.randn(len(draws), heads, 2 * group[0] - 1, 2 * group[1] - 1, dtype=torch.float64),
        torch.float32,
        together=blocked,
        vanishing=dict.fromkeys(blocked, 11),
        device=device_of(backend),
    )


@backends
@pytest.mark.parametrize("group", [(1, 1), (17, 1), (5, 4)], ids=str)
def test_other_groups(backend, group, few_programs):
    """One offset; one axis; more offsets than a program takes at a time."""
    cotangent = torch.randn(2, 2 * group[0] - 1, 2 * group[1] - 1, dtype=torch.float64)
    assert_contract(
        lambda *mlp: table_of(mlp, group, False, backend),
        lambda *mlp: reference(mlp, group),
        weights(6, 2),
        cotangent,
        torch.float64,
        device=device_of(backend),
    )


@backends
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(backend, residual):
    mlp = [x.to(device_of(backend)).requires_grad_() for x in weights(3, 2)]
    fast = backend == "triton"
    assert torch.autograd.gradcheck(lambda *mlp: table_of(mlp, (2, 2), residual, backend), mlp, fast_mode=fast)


@native
def test_many_offsets():
    """More than a share of the C++ kernels takes."""
    cotangent = torch.randn(2, 39, 59, dtype=torch.float64)
    assert_contract(
        lambda *mlp: table_of(mlp, (20, 30), False, "cpu"),
        lambda *mlp: reference(mlp, (20, 30)),
        weights(6, 2),
        cotangent,
        torch.float64,
    )


@native
def test_wide_layers():
    """The C++ kernels take any width and any number of heads."""
    cotangent = torch.randn(130, 5, 3, dtype=torch.float64)
    assert_contract(
        lambda *mlp: table_of(mlp, (3, 2), True, "cpu"),
        lambda *mlp: reference(mlp, (3, 2), True),
        weights(150, 130),
        cotangent,
        torch.float32,
    )


@backends
def test_same_bits(backend, few_programs):
    mlp = [x.to(device_of(backend)).requires_grad_() for x in weights(6, 3, torch.float32)]
    cotangent = torch.randn(3, 9, 7, device=device_of(backend))

    def run():
        table = table_of(mlp, (5, 4), False, backend)
        return [table, *torch.autograd.grad(table, mlp, cotangent)]

    first = run()
    for _ in range(2 if backend == "triton" and device_of(backend) == "cpu" else 20):
        assert all(map(torch.equal, first, run()))


@native
def test_same_bits_for_any_number_of_threads():
    mlp = [x.requires_grad_() for x in weights(6, 3, torch.float32)]
    cotangent, threads, results = torch.randn(3, 59, 47), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            table = table_of(mlp, (30, 24), False, "cpu")
            results.append([table, *torch.autograd.grad(table, mlp, cotangent)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@backends
def test_strided_weights_and_gradient(backend):
    device = device_of(backend)
    mlp = weights(6, 3, torch.float32)
    strided = [torch.stack((x, x), -1)[..., 0].to(device).requires_grad_() for x in mlp]
    table_of(strided, (3, 2), False, backend).sum().backward()  # the gradient of a sum has no strides
    leaves = [x.requires_grad_() for x in mlp]
    reference(leaves, (3, 2)).sum().backward()
    for ours, expected in zip(strided, leaves):
        torch.testing.assert_close(ours.grad.cpu(), expected.grad)


@backends
def test_opcheck(backend):
    from vitkernels._dispatch import operator

    device = torch.device(device_of(backend))
    mlp, table = [x.to(device) for x in weights(2, 2, torch.float32)], torch.randn(2, 3, 5, device=device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for name, args in (
        ("dynamic_position_bias_forward", (mlp, False, 2, 3)),
        ("dynamic_position_bias_backward", (table, mlp, True, 2, 3)),
    ):
        torch.library.opcheck(operator(name, backend, device), args, test_utils=checks)


@pytest.mark.parametrize("backend", [None, triton])
def test_compile(backend):
    module = DynamicPositionBias(96, 3).to(device_of(backend or "cpu"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(3, 5, 3, device=device_of(backend or "cpu"))
    expected = torch.autograd.grad(module((3, 2), backend=backend), list(module.parameters()), cotangent)
    ours = torch.autograd.grad(compiled((3, 2), backend=backend), list(module.parameters()), cotangent)
    assert all(map(torch.equal, ours, expected))
    module.eval()
    with torch.no_grad():
        assert torch.equal(compiled((3, 2), backend=backend), module((3, 2), backend=backend))


# The layer


def test_parameters_have_the_official_names():
    expected = ["pos_proj.weight", "pos_proj.bias"]
    for layer in ("pos1", "pos2", "pos3"):
        expected += [f"{layer}.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    module = DynamicPositionBias(96, 3)
    assert list(module.state_dict()) == expected
    assert all(a is b for a, b in zip(module.weights(), module.parameters()))
    assert [x.shape for x in module.weights()] == [x.shape for x in weights(6, 3)]
    assert DynamicPositionBias(31, 1).hidden == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_computes_in_float32(dtype):
    module = DynamicPositionBias(96, 3).to(dtype)
    table = module(3)
    table.sum().backward()
    assert table.dtype == torch.float32
    assert all(x.grad.dtype == dtype for x in module.parameters())
    assert torch.equal(table, dynamic_position_bias([x.float() for x in module.parameters()], 3))
    assert torch.equal(table, dynamic_position_bias(list(module.parameters()), 3))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_leaves_float32(backend):
    module = DynamicPositionBias(96, 3)
    expected = module(3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(3, backend=backend), expected)


def frozen(dim=96) -> DynamicPositionBias:
    return DynamicPositionBias(dim, 3).eval().requires_grad_(False)


def kept(module: DynamicPositionBias, group=(3, 2)) -> bool:
    """Whether a second call returns the first one's table."""
    return module(group) is module(group)


def test_table_is_kept_where_it_is_constant():
    module = DynamicPositionBias(96, 3)
    assert not kept(module)  # training
    assert not kept(module.eval())  # its gradient may be wanted
    with torch.no_grad():
        assert kept(module)
        assert module(2) is module((2, 2)) and module((2, 3)) is not module((3, 2))
        assert not kept(module.train())
    assert kept(frozen())
    assert kept(frozen().bfloat16())
    assert len(frozen().state_dict()) == 14


def sgd_step(module):
    module.requires_grad_(True)
    module(3).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.requires_grad_(False)


def swap_data_twice(module):
    """The second tensor may be given the memory of the first."""
    for seed in (1, 2):
        module.pos_proj.weight.data = weights(6, 3, torch.float32, seed)[0]


def new_parameter_twice(module):
    for seed in (1, 2):
        module.pos_proj.weight = nn.Parameter(weights(6, 3, torch.float32, seed)[0], requires_grad=False)


def load(module, **kwargs):
    module.load_state_dict(DynamicPositionBias(96, 3).state_dict(), **kwargs)


def data_and_eval(module):
    module.pos_proj.weight.data.mul_(2)
    module.eval()


def data_and_clear(module):
    module.pos_proj.weight.data.mul_(2)
    module.clear_cache()


CHANGES = {
    "in place": lambda module: module.pos_proj.weight.mul_(2),
    "in place, no_grad, one bias": lambda module: module.pos3[2].bias.add_(1),
    "through detach": lambda module: module.pos1[0].weight.detach().mul_(2),
    "through state_dict": lambda module: module.state_dict()["pos2.2.weight"].mul_(2),
    "optimiser step": sgd_step,
    "load_state_dict": load,
    "load_state_dict, assign": lambda module: load(module, assign=True),
    "to float64": lambda module: module.double(),
    "to bfloat16 and back": lambda module: module.bfloat16().float(),
    "new Parameter": new_parameter_twice,
    "data swapped": swap_data_twice,
    "data in place, then eval": data_and_eval,
    "data in place, then clear_cache": data_and_clear,
    "new layer": lambda module: setattr(module, "pos2", DynamicPositionBias(96, 3).requires_grad_(False).pos2),
    "the table itself": lambda module: module(3).zero_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_makes_a_new_table(change):
    module = frozen()
    before = module(3).clone()
    change(module)
    table = module(3)
    expected = dynamic_position_bias(module.weights(), 3)
    assert table.dtype == expected.dtype and torch.equal(table, expected)
    assert change is CHANGES["the table itself"] or not torch.equal(table, before.to(table.dtype))


def test_functional_call_uses_the_given_weights():
    module = frozen()
    module(3)
    other = DynamicPositionBias(96, 3)
    table = torch.func.functional_call(module, dict(other.named_parameters()), (3,))
    assert torch.equal(table, other(3)) and table.requires_grad
    gradient = torch.func.grad(lambda bias: torch.func.functional_call(module, {"pos3.2.bias": bias}, (1,)).sum())
    assert torch.allclose(gradient(torch.randn(3)), torch.ones(3))


def test_copies_do_not_carry_the_table():
    module = frozen()
    table = module(3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert twin(3) is not table and torch.equal(twin(3), table)
        twin.pos_proj.weight.mul_(2)
        assert not torch.equal(twin(3), table)
    assert module(3) is table


def test_inference_mode():
    module = frozen()
    with torch.inference_mode():
        table = module(3)
        assert module(3) is table
        created_inside = frozen()  # its parameters do not count their versions
        assert not kept(created_inside)
    assert module(3) is table and not table.is_inference()
    (table * torch.ones(3, 1, 1, requires_grad=True)).sum().backward()  # autograd may save it


def test_a_module_knows_its_residual():
    module = DynamicPositionBias(96, 3, residual=True)
    table = dynamic_position_bias(module.weights(), 3, residual=True)
    assert torch.equal(dynamic_position_bias(module, 3), table)
    assert torch.equal(dynamic_position_bias(module, 3, residual=True), table)
    with pytest.raises(ValueError, match="residual=False was asked of"):
        dynamic_position_bias(module, 3, residual=False)


def test_the_number_of_tables_is_bounded():
    module = frozen(16)
    for size in range(1, 40):
        module((size, 1))
    assert len(module._tables) <= 16


# Refusals


def replaced(place: int, x) -> list:
    mlp = weights(6, 3, torch.float32)
    return [x if i == place else w for i, w in enumerate(mlp)]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: dynamic_position_bias(torch.ones(2), 7),
            TypeError,
            "or its 14 weights, got Tensor",
        ),
        (lambda: dynamic_position_bias(weights(6, 3)[:13], 7), ValueError, "expected 14 weights.*got 13"),
        (lambda: dynamic_position_bias(replaced(3, 1.0), 7), TypeError, r"pos1.0.bias must be a torch.Tensor \[p\]"),
        (lambda: dynamic_position_bias(replaced(4, torch.ones(6)), 7), ValueError, r"pos1.2.weight must be \[p, p\]"),
        (
            lambda: dynamic_position_bias(replaced(8, torch.ones(6, 5)), 7),
            ValueError,
            r"pos2.2.weight must be \[p, p\] = \[6, 6\].*got \[6, 5\]",
        ),
        (
            lambda: dynamic_position_bias(replaced(0, torch.ones(6, 3)), 7),
            ValueError,
            r"= \[6, 2\].*got \[6, 3\]",
        ),
        (lambda: dynamic_position_bias(replaced(5, torch.ones(6).double()), 7), TypeError, "must have one dtype"),
        (
            lambda: dynamic_position_bias(replaced(5, torch.ones(6).int()), 7),
            TypeError,
            "pos1.2.bias must be one of",
        ),
        (lambda: dynamic_position_bias(replaced(5, torch.ones(6, device="meta")), 7), ValueError, "on one device"),
        (lambda: dynamic_position_bias(weights(6, 3), 0), ValueError, "group_size must be at least 1"),
        (lambda: dynamic_position_bias(weights(6, 3), 7.0), TypeError, "group_size must be an int"),
        (lambda: dynamic_position_bias(weights(6, 3), (7, 7, 7)), ValueError, "one int or"),
        (lambda: dynamic_position_bias(weights(6, 3), 7, backend="gpu"), ValueError, "backend must be one of"),
        (lambda: frozen()(0), ValueError, "group_size must be at least 1"),
        (
            lambda: frozen()(torch.zeros(1, 49, 96)),
            TypeError,
            r"takes the size of a group .* got a Tensor \[1, 49, 96\]. LongShortDistanceAttention takes maps$",
        ),
        (lambda: DynamicPositionBias(torch.zeros(9, 96), 3), TypeError, r"dim must be an int, got a Tensor \[9, 96\]$"),
        (
            lambda: dynamic_position_bias(weights(6, 3), torch.zeros(9, 96)),
            TypeError,
            r"group_size must be an int or a pair of ints, got a Tensor \[9, 96\]$",
        ),
        (
            lambda: dynamic_position_bias(frozen(), 7, residual=True),
            ValueError,
            "residual=True was asked of a DynamicPositionBias with residual=False: leave it out, or make",
        ),
        (lambda: DynamicPositionBias(15, 1), ValueError, "dim must be at least 16"),
        (lambda: DynamicPositionBias(32, 0), ValueError, "heads at least 1"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", [triton])
def test_triton_refuses_what_it_cannot_hold(backend):
    for mlp, message in ((weights(129, 3), "hidden width 129 > 128"), (weights(6, 129), "129 heads > 128")):
        with pytest.raises(RuntimeError, match=f"triton cannot run dynamic_position_bias: {message}"):
            dynamic_position_bias([x.to(device_of(backend)) for x in mlp], 7, backend=backend)
