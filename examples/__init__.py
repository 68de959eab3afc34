"""A small Qwen2 checkpoint, trained for this project, that demo and tests use."""
