"""What is said to help an RNN remember, measured: accuracy and half-life on the demo's task."""
