"""PLACES. The only importer of Ray."""
