"""Studies: one file each, with `sweep(add)`, which names the runs, and `table(runs)`, what they show."""
