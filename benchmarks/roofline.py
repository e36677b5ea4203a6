"""The least that a layer must take: bytes that a fused operator moves, arithmetic that no kernel avoids, and the time
in which a machine of measured copy bandwidth and matmul rates could do either.

python benchmarks/roofline.py [--case GLOB] [--device cuda]    measures the rates, prints every case and its floor

Bytes: every input read once, every output written once; a backward pass reads the inputs and the output's gradient and
writes gradients. Bias tables and position MLPs are left out where they are small beside the map. Arithmetic, in FLOPs
(a multiply-add is two): matrix products, of pairs inside the map only, which run at the rate of the inputs' dtype; and
what is no matrix product, convolutions of single channels and clusters' similarities, at the rate of plain float32. A
backward pass computes the scores again, since nothing of that size is kept. Softmax and norms are left out: the floor
is a bound from below.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cluster_attention
import measure
import partition_attention
import pooled_attention
import torch
import workload

PRODUCTS = {"fwd": 2, "bwd": 5}  # scores and output; scores again and the gradients of weights, q, k and v
PARAMETER = 4  # bytes: float32 whatever the inputs


class Work(NamedTuple):
    bytes: int
    products: int  # FLOPs
    vector: int = 0  # FLOPs


class Rates(NamedTuple):
    """What a machine was measured to do in a second."""

    bandwidth: float  # bytes copied, read plus written
    products: dict[str, float]  # FLOPs of a large matmul, by dtype
    vector: float  # FLOPs in plain float32

    @classmethod
    def measured(cls, device: torch.device, dtypes: Iterable[str], quick: bool = False) -> Rates:
        """Of ``device``. A CPU may widen 16-bit numbers, where that is faster."""
        cuda = device.type == "cuda"
        bandwidth = measure.copy_bandwidth(device, 1 << (30 if cuda else 27 if quick else 28))
        side = 8192 if cuda else 1024 if quick else 2048
        with _plain_float32():
            vector = measure.matmul_rate(device, torch.float32, side)
        products = {name: measure.matmul_rate(device, getattr(torch, name), side if cuda else 1024) for name in dtypes}
        if not cuda:
            products = {name: max(rate, vector) for name, rate in products.items()}
        return cls(bandwidth, products, vector)

    def floor(self, case: workload.Case, batch: int, dtype: str, mode: str) -> tuple[float, str]:
        """Seconds of a pass, and what takes most of them: "memory", "products" or "vector"."""
        if mode == "full":  # one after the other
            seconds, bounds = zip(*(self.floor(case, batch, dtype, one) for one in ("fwd", "bwd")))
            return sum(seconds), bounds[seconds.index(max(seconds))]
        least = work(case, batch, dtype, mode)
        times = {"memory": least.bytes / self.bandwidth, "products": least.products / self.products[dtype]}
        vector = least.vector / self.vector
        if dtype == "float32":  # one unit computes both
            times["products"] += vector
        else:
            times["vector"] = vector
        bound = max(times, key=times.get)
        return times[bound], bound


@contextmanager
def _plain_float32() -> Iterator[None]:
    """No TF32 in matrix products."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def moved(read: int, written: int, mode: str) -> int:
    """Bytes of inputs and outputs; backward of inputs, their gradients and the outputs' gradients."""
    return read + written if mode == "fwd" else 2 * read + written


def _attention(case: workload.Case, batch: int, size: int, mode: str, pairs: int) -> Work:
    """Of ``pairs`` of a query and a key in each head of an image, on a map of tokens x channels."""
    tensor = batch * case.height * case.width * case.dim * size
    return Work(moved(3 * tensor, tensor, mode), PRODUCTS[mode] * 2 * batch * case.dim * pairs)


def of_partition(case: partition_attention.Case, batch: int, size: int, mode: str) -> Work:
    tokens = (case.partition.index(case.height, case.width) >= 0).sum(1)  # of every group
    return _attention(case, batch, size, mode, int((tokens * tokens).sum()))


def _order(case: cluster_attention.Case, batch: int) -> int:
    """Bytes of the order of the tokens, int32."""
    return 4 * batch * case.heads * case.height * case.width


def of_clusters(case: cluster_attention.Case, batch: int, size: int, mode: str) -> Work:
    """At every level: two means; then similarities to two centroids and two weighted sums, and similarities last."""
    elements = batch * case.height * case.width * case.dim
    level = 1 + cluster_attention.ITERATIONS * (4 + 4) + 4
    return Work(elements * size + _order(case, batch), 0, case.levels * level * elements)


def of_leaves(case: cluster_attention.Case, batch: int, size: int, mode: str) -> Work:
    work = _attention(case, batch, size, mode, case.height * case.width * (case.leaf + case.overlap))
    return work._replace(bytes=work.bytes + _order(case, batch))


def of_clusters_and_leaves(case: cluster_attention.Case, batch: int, size: int, mode: str) -> Work:
    """Queries are read once; the order is written forward and read backward."""
    work = of_leaves(case, batch, size, mode)
    return work._replace(vector=of_clusters(case, batch, size, mode).vector) if mode == "fwd" else work


def _taps(tokens: int, stride: int) -> int:
    """Pairs, along an axis, of a window and a token of the map in it."""
    reach = pooled_attention.KERNEL // 2
    return sum(min(centre + reach, tokens - 1) - max(centre - reach, 0) + 1 for centre in range(0, tokens, stride))


def _pools(case: pooled_attention.Case) -> int:
    """Bytes of convolutions and norms."""
    return PARAMETER * (2 + case.pools_queries) * case.head_dim * (pooled_attention.KERNEL ** len(case.thw) + 2)


def _tables(case: pooled_attention.Case) -> int:
    """Bytes of the tables of relative positions."""
    return PARAMETER * case.head_dim * sum(case.table_lengths)


def of_pooling(case: pooled_attention.Case, batch: int, size: int, mode: str) -> Work:
    """Queries that are not pooled are handed on: only their gradient is moved."""
    row = batch * case.dim * size
    written = (case.queries + 2 * case.keys) * row
    handed_on = 0 if case.pools_queries else case.queries * row
    bytes = moved(3 * case.tokens * row + _pools(case), written, mode) - handed_on * (2 if mode == "fwd" else 1)
    pooled = case.strides if case.pools_queries else case.strides[1:]
    taps = sum(math.prod(map(_taps, case.thw, stride)) for stride in pooled)
    convolutions = {"fwd": 1, "bwd": 2}[mode]  # the gradients of its input and of its weight
    return Work(bytes, 0, convolutions * 2 * batch * case.dim * taps)


def of_pooled(case: pooled_attention.Case, batch: int, size: int, mode: str) -> Work:
    """With relative positions every query meets a row of a table for each line of keys."""
    row = batch * case.dim * size
    read, written = (case.queries + 2 * case.keys) * row + _tables(case), case.queries * row
    lines = sum(case.k_thw) if case.v2 else 0
    terms = {"fwd": 1, "bwd": 3}[mode]  # again, and the gradients of queries and tables
    rows = PRODUCTS[mode] * case.keys + terms * lines
    return Work(moved(read, written, mode), 2 * batch * case.dim * case.queries * rows)


def of_pooling_and_attention(case: pooled_attention.Case, batch: int, size: int, mode: str) -> Work:
    """What is pooled is neither written nor kept."""
    row = batch * case.dim * size
    read, written = 3 * case.tokens * row + _pools(case) + _tables(case), case.queries * row
    vector = of_pooling(case, batch, size, mode).vector
    return Work(moved(read, written, mode), of_pooled(case, batch, size, mode).products, vector)


COUNTS: dict[type, Callable[..., Work]] = {
    partition_attention.Workload: of_partition,
    cluster_attention.Clustering: of_clusters,
    cluster_attention.Attention: of_leaves,
    cluster_attention.ClusteringAndAttention: of_clusters_and_leaves,
    pooled_attention.Pooling: of_pooling,
    pooled_attention.Attention: of_pooled,
    pooled_attention.PoolingAndAttention: of_pooling_and_attention,
}


def work(case: workload.Case, batch: int, dtype: str, mode: str) -> Work:
    """What a pass ("fwd", "bwd" or "full", which is both) of a fused operator has to do."""
    count, size = COUNTS[case.kind], getattr(torch, dtype).itemsize
    if mode == "full":
        return Work(*map(sum, zip(*(count(case, batch, size, one) for one in ("fwd", "bwd")))))
    return count(case, batch, size, mode)


def main(argv: list[str] | None = None) -> int:
    from cases import CASES

    parser = argparse.ArgumentParser(prog="python benchmarks/roofline.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--case", nargs="+", default=["*"], metavar="GLOB", help="names of cases, with wildcards")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 on a GPU", choices=workload.DTYPES)
    parser.add_argument("--batch", type=int, help="images; the default is each case's own")
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    cases = workload.select(CASES, args.case)
    if not cases:
        parser.error(f"no case matches {' '.join(args.case)}; benchmarks/run.py --list prints the cases")
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    rates = Rates.measured(device, [dtype])
    print(
        f"copy {rates.bandwidth / 1e9:.1f} GB/s, {dtype} products {rates.products[dtype] / 1e9:.0f} GFLOP/s, "
        f"plain float32 {rates.vector / 1e9:.0f} GFLOP/s\n"
    )
    print(f"{'case':<36} {'batch':>5} {'pass':<4} {'MB':>9} {'GFLOP':>9} {'floor, us':>10}  set by")
    for case in cases:
        batch = args.batch or case.batch(device.type)
        for mode in case.kind.modes:
            least = work(case, batch, dtype, mode)
            seconds, bound = rates.floor(case, batch, dtype, mode)
            flops = least.products + least.vector
            print(
                f"{case.name:<36} {batch:>5} {mode:<4} {least.bytes / 1e6:>9.2f} {flops / 1e9:>9.3f} "
                f"{seconds * 1e6:>10.1f}  {bound}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
