"""The C++ twin of the kernels: compiled at first use, cached, run in one call a step."""
