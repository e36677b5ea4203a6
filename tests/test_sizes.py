"""One graph, one exported program, one file for maps of all sizes: they divide or not, or are smaller than a group."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitkernels import (
    CrossShapedWindowAttention,
    DynamicPositionBias,
    FeatureSpaceAttention,
    LongShortDistanceAttention,
    MaxSA,
    MultiScaleAttention,
    Partition,
    WindowAttention,
    partition_attention_qkvpacked,
    use_backend,
)

SIZES = [(14, 21), (9, 16), (20, 23), (5, 40), (5, 6), (14, 14), (28, 7), (7, 15), (13, 3), (8, 8)]
OTHERS = [(3, 20, 23), (2, 5, 40), (1, 14, 21), (4, 5, 6), (2, 7, 7)]  # batch, height, width
AUTO = ({axis: torch.export.Dim.AUTO for axis in range(3)},)


class Groups(nn.Module):
    dim = 8

    def __init__(self, partition):
        super().__init__()
        self.partition, self.qkv = partition, nn.Linear(8, 24)

    def forward(self, x):
        return partition_attention_qkvpacked(self.qkv(x).unflatten(-1, (3, 2, 4)), self.partition)


class OnMap(nn.Module):
    dim = 8

    def __init__(self, **options):
        super().__init__()
        self.attn = MultiScaleAttention(8, 8, 2, (14, 14), kernel_q=3, kernel_kv=3, stride_kv=2, **options)

    def forward(self, x):
        return self.attn(x.flatten(1, 2), x.shape[1:3])[0]


class Table(nn.Module):
    dim = 8

    def __init__(self):
        super().__init__()
        self.pos = DynamicPositionBias(16, 2)

    def forward(self, x):
        return self.pos(tuple(x.shape[1:3])) * x.mean()


LAYERS = {
    "window": lambda: Groups(Partition.window(7)),
    "grid": lambda: Groups(Partition.grid(7)),
    "long": lambda: Groups(Partition.long(7, 2)),
    "interval_only": lambda: Groups(Partition.interval_only(2)),
    "stripes": lambda: Groups(Partition.stripes(3)),
    "shifted windows": lambda: WindowAttention(8, 2, 7, 3),
    "MaxSA": lambda: MaxSA(8, 2, "grid", 7),
    "SDA": lambda: LongShortDistanceAttention(16, 2, 7),
    "LDA": lambda: LongShortDistanceAttention(16, 2, 7, 2),
    "LDA, derived groups": lambda: LongShortDistanceAttention(16, 2, None, 4),
    "LDA, derived interval": lambda: LongShortDistanceAttention(16, 2, 7, None),
    "CSWin": lambda: CrossShapedWindowAttention(8, 2, 3),
    "CSWin, last stage": lambda: CrossShapedWindowAttention(8, 2, last_stage=True),
    "clusters": lambda: FeatureSpaceAttention(8, 2, 16, 4),
    "pooled": lambda: OnMap(rel_pos_spatial=True, residual="all"),
    "position bias": Table,
}


@torch._dynamo.config.patch(specialize_float=True)  # else the first graph is compiled twice: floats are no sizes
def graphs(layer, tracer="aot_eager"):
    """Graphs that all sizes take, each compared with the layer as it is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(tracer)
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for size in SIZES:
        x = torch.randn(2, *size, layer.dim)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outs = [run(x) for run, x in zip((compiled, layer), inputs)]
        gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in zip(outs, inputs)]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*gradients)
    return counter.frame_count


@pytest.mark.parametrize("name", LAYERS)
def test_two_graphs_at_most_serve_all_sizes(name):
    assert graphs(LAYERS[name]()) <= 2


def test_two_graphs_at_most_serve_all_sizes_in_the_reference():
    with use_backend("reference"):
        assert graphs(LAYERS["grid"](), "eager") <= 2


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", ["window", "clusters", "pooled", "position bias"])
def test_a_graph_does_not_ask_for_autocast(name, backend, monkeypatch):
    """As if this were torch 2.11, which cannot trace the question."""
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    torch._dynamo.reset()
    layer = LAYERS[name]()
    x = torch.randn(1, 4, 4, layer.dim)
    with use_backend(backend):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_one_exported_program_serves_all_sizes(name):
    layer = LAYERS[name]().eval()
    run = torch.export.export(layer, (torch.randn(2, 20, 23, layer.dim),), dynamic_shapes=AUTO).module()
    for size in OTHERS:
        x = torch.randn(*size, layer.dim)
        torch.testing.assert_close(run(x), layer(x))


def onnx(layer, path, **options):
    """What a file made at 20 x 23 computes."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with use_backend("reference"):
        torch.onnx.export(layer, (torch.randn(2, 20, 23, layer.dim),), path, input_names=["x"], **options)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_one_onnx_file_serves_all_sizes(tmp_path):
    layer = LAYERS["MaxSA"]().eval()
    run = onnx(layer, tmp_path / "layer.onnx", dynamo=True, verbose=False, dynamic_shapes=AUTO)
    for size in OTHERS:
        x = torch.randn(*size, layer.dim)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the older exporter is deprecated
@pytest.mark.parametrize("name", ["shifted windows", "MaxSA", "SDA", "LDA", "LDA, derived groups", "pooled"])
def test_one_file_of_the_older_exporter_serves_all_sizes(name, tmp_path):
    layer = LAYERS[name]().eval()
    axes = {"x": {0: "batch", 1: "height", 2: "width"}}
    run = onnx(layer, tmp_path / "layer.onnx", dynamo=False, dynamic_axes=axes)
    for size in (*OTHERS, (1, 23, 20), (1, 40, 46)):
        x = torch.randn(*size, layer.dim)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)
