"""Kernels over paged keys and values. `kernels.ops` is the contract; everything else stands behind it."""
