"""The layer against its peers, in one run: ``python -m rnnfast bench`` (see bench/README.md)."""
