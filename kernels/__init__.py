"""The two hot operations of the generator, one file each, in plain PyTorch."""
