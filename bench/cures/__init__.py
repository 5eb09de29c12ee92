"""Measures remedies for forgetting: accuracy and half-life on the demo's task."""
