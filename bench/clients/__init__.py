"""Trains models of other libraries before and after rnnfast.replace."""
