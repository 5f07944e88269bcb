"""DECIDES. Pure state machines: stdlib only, no clock, no I/O; `now` is integer nanoseconds."""
