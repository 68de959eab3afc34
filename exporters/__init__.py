"""From a checkpoint to a bundle on disk."""
