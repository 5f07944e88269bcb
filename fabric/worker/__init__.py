"""EXECUTES. Plain classes, no Ray: a plan goes in, sampled tokens come out."""
