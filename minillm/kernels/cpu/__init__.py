"""What makes PyTorch fast on a CPU."""
