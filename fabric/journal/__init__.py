"""REMEMBERS. What `core.journal` writes down, in files; read again, replayed, explained."""
