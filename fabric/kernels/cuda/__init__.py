"""A decoder program on a GPU: one Triton kernel or cuBLAS product an op."""
