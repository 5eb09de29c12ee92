"""Tools that run a module to measure its gradients.

probe sends a gradient of no particular loss through an RNN; monitor records every step of a
training, history keeps the numbers, lightning is the monitor as a callback; picture and heat_map
draw; command is ``python -m rnnfast probe``.
"""
