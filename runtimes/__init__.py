"""From a bundle on disk to tokens and logits."""
