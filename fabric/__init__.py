"""fabric: a distributed LLM serving system on Ray. One decision core, two clocks."""

__version__ = "0.1.0"
