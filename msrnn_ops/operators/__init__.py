"""The operators as PyTorch sees them: registration, fake tensors, autograd, DTensors."""
