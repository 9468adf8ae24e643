"""The two hot operations of the project, each in one file with its plain PyTorch twin."""
