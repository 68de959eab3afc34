"""The arithmetic of quantization, which knows no target."""
