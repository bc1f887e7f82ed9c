"""Really sparse compute: kernels that touch active weights only. So far the kernels; packed weights build on them."""
