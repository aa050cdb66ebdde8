"""The mathematics of flow matching: tensors in, tensors out. It knows torch, torchdiffeq, scipy and POT only."""
