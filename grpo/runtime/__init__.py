"""The machine and the model: loading, which parameters learn, devices, seeds."""
