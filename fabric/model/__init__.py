"""COMPUTES. A model folder becomes a decoder program and its weights."""
