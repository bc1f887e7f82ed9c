"""Studies, one file each.

Those of `SWEEPS` have `sweep(add)`, which names the runs of `experiments.launch --study NAME`, and `table(runs)`, which
shows them. The others are commands of their own.
"""

SWEEPS = ("fashion_mnist",)
