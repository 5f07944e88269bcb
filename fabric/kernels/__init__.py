"""COMPUTES, one file an op: torch reference, kernel, launcher. Knows nothing of fabric."""
