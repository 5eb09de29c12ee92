"""What this GPU can do, measured in one command: ``make gpu-probe`` (see README.md here)."""
