"""The traffic loop, every request: admit or shed, which version, which replica."""
