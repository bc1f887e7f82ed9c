"""The kernels for NVIDIA's GPUs: run on the host by an emulator (tests/execution/cuda), against NumPy.

An index outside of an array, or a barrier that some threads miss, is an error there. What only a GPU shows, such as
races between blocks, is not seen. tests/experiments/test_ahead.py shows that programs for a GPU call the kernels.
"""

import concurrent.futures
import ctypes
import dataclasses
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import native
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import cuda as products
from rigl_jax.native import build, cuda

EMULATOR = pathlib.Path(__file__).parent / "cuda"
KINDS = ("forward", "input_gradient", "values_gradient")


@pytest.fixture(scope="module", autouse=True)
def emulated(tmp_path_factory):
    """The library for GPUs compiled for the host, its handlers registered for the CPU."""
    if os.environ.get("RIGL_JAX_NATIVE") == "0":
        pytest.skip("a test of native kernels")
    try:
        compiler, include = build.compiler(), build.headers()
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("emulated")
    flags = ("-std=c++17", "-w", "-fPIC", "-fvisibility=hidden", "-DRIGL_EMULATED", "-I", EMULATOR, "-isystem", include)

    def compiled(unit):
        # The handlers are mostly templates of XLA, which take long to optimise.
        optimised = "-O1" if unit.source.endswith(".cu") else "-O0"
        source, made = build.SOURCES / "cuda" / unit.source, folder / f"{unit.name}.o"
        subprocess.run([compiler, *flags, optimised, "-x", "c++", "-c", source, "-o", made], check=True)
        return made

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, build.CUDA_UNITS))
    subprocess.run([compiler, "-shared", *objects, "-o", folder / "emulated.so"], check=True)
    library = ctypes.CDLL(str(folder / "emulated.so"))
    assert library.rigl_cuda_fault() == 0
    cuda.register(library, "cpu")


def oracle(scores, k, among):
    """By a stable sort: candidates first, NaN last of them."""
    places = np.lexsort((-np.asarray(scores, np.float32), ~among))
    taken = np.zeros(len(places), bool)
    taken[places[: max(0, min(k, int(among.sum())))]] = True
    return taken


def drawn(rng, n, ties):
    x = rng.standard_normal(n).astype(np.float32)
    x = np.round(2 * x) if ties else x
    strange = rng.random(n) < 0.05
    x[strange] = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], strange.sum())
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_selection(dtype):
    """Leaves of one score, of one block of threads and of several; nothing taken, all, more than there are."""
    rng = np.random.default_rng(0)
    scores = [
        jnp.asarray(drawn(rng, n, ties), dtype) for n, ties in ((1, False), (31, True), (5000, False), (14_001, True))
    ]
    among = [None if n == 5000 else rng.random(n) < 0.7 for n in (1, 31, 5000, 14_001)]
    select = jax.jit(lambda k: cuda.select_each(scores, k, among))
    for counts in ((1, 3, 500, 4000), (0, -3, 5000, 14_001), (7, 40, 4999, 1)):
        found = select(jnp.asarray(counts, jnp.int32))
        for x, k, candidates, taken in zip(scores, counts, among, found, strict=True):
            wanted = oracle(x, k, np.ones(x.size, bool) if candidates is None else candidates)
            np.testing.assert_array_equal(taken, wanted)


def test_selection_of_more_leaves_than_one_search_takes():
    """Of a batch of 40, two leaves each."""
    rng = np.random.default_rng(1)
    a, b = (np.round(rng.standard_normal((40, n))).astype(np.float32) for n in (3, 5))
    k = rng.integers(0, 6, (40, 2)).astype(np.int32)
    found = jax.jit(jax.vmap(lambda a, b, k: cuda.select_each([a, b], k, [None, a[0] < b])))(a, b, k)
    for i in range(40):
        np.testing.assert_array_equal(found[0][i], oracle(a[i], k[i, 0], np.ones(3, bool)))
        np.testing.assert_array_equal(found[1][i], oracle(b[i], k[i, 1], a[i, 0] < b[i]))


def pattern_of(height, inputs, outputs, block):
    """With an input and an output without weights."""
    rng = np.random.default_rng(2)
    runs = rng.random((inputs, outputs // height)) < 0.2
    runs[1], runs[:, 0] = False, False
    capacity = int(runs.sum()) + 7  # the rest is padding
    return kernels.make_pattern(np.repeat(runs, height, axis=1), height=height, block=block, capacity=capacity)


def operands(pattern, batch, dtype):
    rng = np.random.default_rng(3)
    sizes = ((batch, pattern.rows), (pattern.nnz,), (batch, pattern.shape[-1]))
    return tuple(jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)


def all_three(x, values, dy, pattern):
    pairs = {"forward": (x, values), "input_gradient": (dy, values), "values_gradient": (x, dy)}
    return [products.run(kind, *pairs[kind], pattern) for kind in KINDS]


@pytest.mark.parametrize(
    ("height", "dtype", "batch", "inputs", "block"),
    [
        (1, "float32", 131, 20, 16),  # more than one block of examples; blocks of the pattern
        (1, "bfloat16", 1, 33, None),
        (1, "bfloat16", 3, 400, None),  # more inputs than are staged at once
        (16, "float32", 1, 33, 16),
        (16, "float32", 3, 200, None),
        (16, "bfloat16", 131, 20, None),
    ],
)
def test_products(height, dtype, batch, inputs, block):
    pattern = pattern_of(height, inputs, 48, block)
    x, values, dy = operands(pattern, batch, dtype)
    found = jax.jit(all_three)(x, values, dy, pattern)
    weight = np.asarray(kernels.scatter(values, pattern), np.float64)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    at_entries = kernels.gather(jnp.asarray(x64.T @ dy64, jnp.float32), pattern)
    for kind, got, wanted in zip(KINDS, found, (x64 @ weight, dy64 @ weight.T, at_entries), strict=True):
        assert got.dtype == dtype
        size = np.sqrt(np.mean(np.square(wanted)))
        error = np.abs(np.asarray(got, np.float64) - wanted).max() / size
        assert error < (1e-5 if dtype == "float32" else 2e-2), kind


def damaged(pattern):
    """Arrays that `make_pattern` never makes, by name."""
    last, entries = pattern.starts.size - 1, pattern.indices.size
    put = lambda name, at, value: dataclasses.replace(pattern, **{name: getattr(pattern, name).at[at].set(value)})  # noqa: E731
    yield "starts far after the entries", put("starts", last // 2, 1 << 30)
    yield "negative start", put("starts", last // 2, -(1 << 30))
    yield "starts end after the entries", put("starts", last, entries + 1)
    yield "what follows the last segment is no padding", put("indices", entries - 1, 0)
    yield "starts begin after the first entry", put("starts", 0, 1)
    yield "input that does not exist", put("indices", entries // 2, 65534)


@pytest.mark.parametrize("height", [1, 16])
def test_damaged_patterns_give_nan_and_leave_no_array(height):
    """An index out of range is an error of the emulator."""
    pattern = pattern_of(height, 33, 48, None)
    cases = list(damaged(pattern))
    run = {batch: jax.jit(all_three) for batch in (1, 3)}
    for batch, compiled in run.items():
        x, values, dy = operands(pattern, batch, "float32")
        for name, bad in cases:
            y, dx, dvalues = compiled(x, values, dy, bad)
            assert np.isnan(y).any(), name
            assert np.isnan(dvalues).all(), name
            assert np.isnan(dx).all() or height == 1, name  # those of single weights read the transposed arrays
        if height == 1:
            bad = dataclasses.replace(pattern, order_t=pattern.order_t.at[3].set(-1))
            assert np.isnan(compiled(x, values, dy, bad)[1]).any()


def test_arrays_that_do_not_fit_are_refused():
    pattern = pattern_of(1, 33, 48, None)
    x, values, dy = operands(pattern, 3, "float32")
    order = jnp.zeros(0, jnp.int32)
    call = lambda target, shape, *arrays, **sizes: cuda.product(  # noqa: E731
        f"rigl_cuda_{target}", shape, jnp.float32, *arrays, **{"height": 1, "block": pattern.block, **sizes}
    )
    at = (pattern.indices, pattern.starts)
    for refuse in (
        lambda: call("gather", (3, 48), x.T, values[1:], order, *at),
        lambda: call("gather", (3, 47), x.T, values, order, *at),
        lambda: call("gather", (3, 48), x.T[1:], values, order, *at, block=1),
        lambda: call("gather", (3, 48), x.T, values, pattern.order_t[1:], *at),
        lambda: call("gather", (3, 48), x.T, values, order, *at, height=4),
        lambda: call("gather", (3, 48), x.T.astype(jnp.float16), values, order, *at),
        lambda: call("scatter", (3, 33), dy.T, values, *at),
        lambda: call("dots", (pattern.nnz,), x.T, dy.T[:, :2], *at),
        lambda: call("dots", (pattern.nnz - 1,), x.T, dy.T, *at),
        lambda: cuda.select_each([x[0], x[0].astype(jnp.bfloat16)], jnp.ones(2, jnp.int32), [None, None])[0],
        lambda: cuda.select_each([x[0]], jnp.ones(1, jnp.int32), [jnp.ones(5, bool)])[0],
    ):
        with pytest.raises(Exception, match="rigl_jax: CUDA kernel: "):
            jax.block_until_ready(refuse())


def test_when_the_kernels_are_used(monkeypatch):
    """By prediction; always where asked for; never where the library is missing, or does not take the operands."""
    used = []
    monkeypatch.setattr(products, "run", lambda *args: used.append("ours"))
    monkeypatch.setattr(products.reference, "run", lambda *args: used.append("plain"))
    monkeypatch.setattr(cuda, "serves", lambda: True)
    pattern = pattern_of(1, 200, 48, None)
    x, values, _ = operands(pattern, 3, "float32")

    def chosen(level="auto", x=x, pattern=pattern):
        used.clear()
        products.run_cuda("forward", x, values, pattern, level)
        return used[0]

    assert chosen() == "plain"  # a fifth of the weights, against tensor cores
    assert chosen("cuda") == "ours"
    assert chosen(x=x[:1]) == "ours"
    assert chosen("jax", x=x[:1]) == "plain"
    assert chosen("cuda", x=x.astype(jnp.float16)) == "plain"
    sparse = kernels.make_pattern(np.eye(200, 48, dtype=bool))
    assert chosen(pattern=sparse) == "ours"
    with jax.default_matmul_precision("highest"):
        assert chosen(pattern=pattern_of(16, 200, 48, None)) == "ours"
    monkeypatch.setattr(cuda, "serves", lambda: False)
    assert chosen("cuda") == "plain"


def test_the_level_of_gpus_is_no_level_of_cpus():
    pattern = pattern_of(1, 20, 48, None)
    x, values, _ = operands(pattern, 2, "float32")
    on_cuda, auto = (kernels.matmul(x, values, pattern, level=level) for level in ("cuda", "auto"))
    np.testing.assert_array_equal(on_cuda, auto)
    assert "cuda" not in native.levels()
