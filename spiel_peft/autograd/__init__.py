"""Forward and backward passes through adapted weights: gradients at the trained positions only."""
