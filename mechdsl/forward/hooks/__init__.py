"""Full forward passes of a loaded model, with activations read and written."""
