"""What runs an experiment: models, data, training, records and reports, built on `rigl_jax`."""
