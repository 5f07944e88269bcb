"""FORETELLS. The core's own objects under a virtual clock: only time and hardware are replaced."""
