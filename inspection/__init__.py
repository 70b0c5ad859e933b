"""What AMP did to a PyTorch model."""
