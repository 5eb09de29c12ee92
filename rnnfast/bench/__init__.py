"""``python -m rnnfast bench``: times a layer beside its peers in one run. See bench/README.md."""
