"""The engine loop, every few ms: which tokens run in this step, in which blocks."""
