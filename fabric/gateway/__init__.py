"""SPEAKS. HTTP and text."""
