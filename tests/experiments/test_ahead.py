"""Programs compiled for an H100 and a TPU v5e without a device: what they start, and that they compile at all.

Skipped where the compilers are missing (`pip install -e .[ahead]`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from experiments.benchmarks import ahead
from rigl_jax import topology
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import mosaic, pallas
from rigl_jax.native import cuda

F32 = jnp.float32
WEIGHTS = {name: jax.ShapeDtypeStruct((256, 256), F32) for name in ("a", "b")}
X = jax.ShapeDtypeStruct((128, 256), F32)


def needs(target):
    if not ahead.available(target):
        pytest.skip(f"the compiler for {target} is not installed")


def step_of(inner, **options):
    def step(params, state, x):
        loss = lambda params: jnp.mean(jax.nn.relu(x @ params["a"]) @ params["b"])  # noqa: E731
        updates, state = inner.update(jax.grad(loss)(params), state, params, **options)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_a_masked_step_is_a_dense_step(target):
    """Masks are multiplied in passes over the weights that there are anyway; nothing is copied."""
    needs(target)
    adam = optax.adam(1e-3)
    plan = rx.make_plan(WEIGHTS, 0.9)
    sparse = rx.sparsify(adam, rx.rigl(plan), key=jax.random.key(0))
    made = {}
    for name, inner, options in (("dense", adam, {}), ("masked", sparse, {"rewire": False})):
        state = jax.eval_shape(inner.init, WEIGHTS)
        made[name] = ahead.compile(target, step_of(inner, **options), WEIGHTS, state, X, donate_argnums=(0, 1))
    dense, masked = (ahead.launches(made[name]) for name in ("dense", "masked"))
    assert masked.open_loops == dense.open_loops == 0
    assert masked.kernels <= dense.kernels + 2
    assert ahead.temporary(made["masked"]) <= ahead.temporary(made["dense"]) + 4 * 256


@pytest.fixture
def plain_jax(monkeypatch):
    """Without the native kernels for GPUs."""
    monkeypatch.setattr(cuda, "serves", lambda: False)


def test_a_selection_reads_the_scores_once_for_every_four_bits(plain_jax):
    needs("h100")
    compiled = ahead.compile("h100", lambda s: topology.select(s, 1000), jax.ShapeDtypeStruct((1 << 20,), F32))
    found = ahead.launches(compiled)
    assert found.kernels < 80  # 213 with one bit in a pass
    assert found.open_loops == 1  # of ties, without a round where nothing is tied
    assert ahead.temporary(compiled) < 6 << 20  # keys and ties, and no array of indices


def patterns():
    rng = np.random.default_rng(0)
    blocks = lambda h, w: np.kron(rng.random((256 // h, 256 // w)) < 0.3, np.ones((h, w), bool))  # noqa: E731
    yield "single weights", kernels.make_pattern(blocks(1, 1))
    yield "runs of 16", kernels.make_pattern(blocks(1, 16), height=16)
    yield "tiles", kernels.make_block_pattern(blocks(32, 32))
    yield "2:4", kernels.make_nm_pattern(np.tile([[1], [0], [1], [0]], (64, 256)).astype(bool), 2, 4)
    wide = np.tile([[1], [0], [1], [0]], (64, 256)).astype(bool)
    yield "2:4, alike in runs of 16", kernels.make_nm_pattern(wide, 2, 4, width=16)
    yield "convolution", kernels.make_pattern(rng.random((3, 3, 16, 16)) < 0.3)


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_every_pattern_compiles(target):
    """With its gradients; in minutes the suite would stop."""
    needs(target)
    with ahead.pretended(target):
        found = list(patterns())
    for name, pattern in found:
        images, product = (
            (X, kernels.matmul) if name != "convolution" else (X.update(shape=(2, 8, 8, 16)), kernels.conv)
        )
        loss = lambda x, v, product=product, pattern=pattern: jnp.sum(jnp.sin(product(x, v, pattern)))  # noqa: E731
        values = jax.ShapeDtypeStruct((pattern.nnz,), F32)
        text = ahead.compile(target, jax.grad(loss, argnums=(0, 1)), images, values).as_text()
        # With this hint on sums XLA compiles for minutes on GPUs.
        assert not [line for line in text.splitlines() if " scatter(" in line and "indices_are_sorted=true" in line], (
            name
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_whole_tiles_compile_for_a_tpu(dtype):
    needs("v5e")
    pattern = kernels.make_block_pattern(np.kron(np.eye(2, dtype=bool), np.ones((128, 128), bool)), (128, 128))
    loss = lambda x, values: jnp.sum(pallas.matmul(x, values, pattern))  # noqa: E731
    values = jax.ShapeDtypeStruct((pattern.nnz,), dtype)
    text = ahead.compile("v5e", jax.grad(loss, argnums=(0, 1)), X.update(dtype=dtype), values).as_text()
    assert text.count("tpu_custom_call") >= 2  # the gradients of the input and of the values


@pytest.mark.parametrize(
    ("dtype", "side", "kernels_each"),
    [(dtype, side, 1) for dtype in ("bfloat16", "float16") for side in (64, 128)]
    + [("float32", side, 2) for side in (64, 128)],
)
def test_tiles_on_a_gpu(dtype, side, kernels_each):
    """y and both gradients: a kernel each, in float32 also a transposing one, and nothing stored between them."""
    needs("h100")
    mask = np.kron(np.tril(np.ones((4, 4))), np.ones((side, side))).astype(bool)
    with ahead.pretended("h100"):
        pattern = mosaic.tile_pattern(kernels.make_block_pattern(mask, (side, side)))

    def all_three(x, values, dy, pattern):
        y, pull = jax.vjp(lambda x, values: mosaic.matmul(x, values, pattern), x, values)
        return y, *pull(dy)

    x, values = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((256, 4 * side), (pattern.tiles.nnz,)))
    compiled = ahead.compile("h100", all_three, x, values, x, pattern)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    assert ahead.launches(compiled).kernels <= 3 * kernels_each
    assert dtype == "float32" or ahead.temporary(compiled) == 0


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_leaves_are_rewired_by_one_search(target, plain_jax):
    """One for what is dropped, one for what is grown, whatever the number of leaves."""
    needs(target)
    plan = rx.make_plan(WEIGHTS, 0.9)
    masks = {name: jax.ShapeDtypeStruct(w.shape, bool) for name, w in WEIGHTS.items()}
    rewire = lambda masks, drop, grow: topology.drop_and_grow(plan, masks, drop, grow, 0.3)  # noqa: E731
    compiled = ahead.compile(target, rewire, masks, WEIGHTS, WEIGHTS)
    assert ahead.launches(compiled).open_loops == 2 or target == "v5e"  # of ties; on a TPU rounds are not written down


@pytest.mark.skipif(cuda.library() is None, reason=cuda.reason())
def test_the_native_kernels_on_a_gpu():
    """One selection for what is dropped of all leaves and one for what is grown; a call for each of three products."""
    needs("h100")
    plan = rx.make_plan(WEIGHTS, 0.9)
    masks = {name: jax.ShapeDtypeStruct(w.shape, bool) for name, w in WEIGHTS.items()}
    rewire = lambda masks, drop, grow: topology.drop_and_grow(plan, masks, drop, grow, 0.3)  # noqa: E731
    compiled = ahead.compile("h100", rewire, masks, WEIGHTS, WEIGHTS)
    assert compiled.as_text().count('custom_call_target="rigl_cuda_select"') == 2
    assert ahead.launches(compiled).open_loops == 0
    assert ahead.launches(compiled).kernels < 60
    assert ahead.temporary(compiled) < 2 * 4 * cuda.PER_LEAF * len(WEIGHTS) + 5 * 256 * 256 * len(WEIGHTS)

    for name, called in (("single weights", {"gather": 2, "dots": 1}), ("runs of 16", dict.fromkeys(HANDLERS, 1))):
        pattern = dict(patterns())[name]

        def all_three(x, values, dy, pattern=pattern):
            y, pull = jax.vjp(lambda x, values: kernels.matmul(x, values, pattern, level="cuda"), x, values)
            return y, *pull(dy)

        compiled = ahead.compile("h100", all_three, X, jax.ShapeDtypeStruct((pattern.nnz,), F32), X)
        found = [compiled.as_text().count(f'custom_call_target="rigl_cuda_{handler}"') for handler in HANDLERS]
        assert found == [called.get(handler, 0) for handler in HANDLERS]
        assert ahead.temporary(compiled) < 2 * 4 * 128 * 256 + 4096  # x and dy, feature-major; no dense weight


HANDLERS = ("gather", "scatter", "dots")


PROGRAM = """HloModule m
%body (p: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  ROOT %f = s32[] fusion(%p), kind=kLoop, calls=%inner
}
%inner (q: s32[]) -> s32[] {
  ROOT %q = s32[] add(%q, %q)
}
ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %w = s32[] while(%a), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %o = s32[] while(%w), condition=%body, body=%body
  %c = s32[] custom-call(%o), custom_call_target="rigl_cuda_dots"
  ROOT %t = s32[] conditional(%c, %a, %a), branch_computations={%inner, %body}
}
"""


def test_counting_of_kernels_in_loops_and_branches():
    program = type("Program", (), {"as_text": lambda self: PROGRAM})()
    assert ahead.launches(program) == ahead.Launches(kernels=20, open_loops=1, in_open_loops=2)
