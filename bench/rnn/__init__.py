"""The layer on the CPU against its peers, in one run: ``make bench`` (see README.md here)."""
