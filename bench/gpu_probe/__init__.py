"""``make gpu-probe`` measures what this GPU can do. See README.md in this folder."""
