"""Tools that run a module to see what its gradients do."""
