"""Everything that a machine with a GPU can say about rnnfast. See README.md."""
