"""The ten lines of a README in an environment that holds nothing but the wheel: `ten_lines.py README WHEEL`."""

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import rigl_jax as rx

README, WHEEL = sys.argv[1:]
(code,) = re.findall(r"^```python\n(.*?)^```", Path(README).read_text(), re.DOTALL | re.MULTILINE)
first, last = jax.random.normal(jax.random.key(1), (2, 64, 64))


def loss(params, batch):
    """Any loss of any model."""
    return jnp.mean((jax.nn.relu(batch @ params["first"]) @ params["last"]) ** 2)


names = {"params": {"first": first, "last": last}, "batch": jnp.ones((4, 64)), "loss": loss}
exec(code, names)
rx.check_masked(names["params"], names["state"].masks)

assert "site-packages" in rx.__file__, rx.__file__
assert rx.__version__ == importlib.metadata.version("rigl_jax")
assert Path(rx.__file__).with_name("py.typed").exists()
for other in ("flax", "matplotlib", "experiments"):  # what only extras or the sources hold
    assert importlib.util.find_spec(other) is None, other
native = rx.execution.backends()["native"]
assert native.available == ("any" not in WHEEL), native
packed = rx.pack(names["params"], names["state"].masks)
value = rx.run_packed(loss)(packed, names["batch"])
assert jnp.allclose(value, loss(names["params"], names["batch"]), rtol=1e-4)
print(f"{WHEEL}: the ten lines run; native kernels: {native.detail}")
