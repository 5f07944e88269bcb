"""The compile gate: every kernel, as it is launched, compiled for GPUs that are not here."""
