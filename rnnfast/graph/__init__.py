"""How torch's compilers, exporters and counters see the ops."""
