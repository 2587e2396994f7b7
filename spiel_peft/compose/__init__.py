"""Several adapters together: active at once, combined with weights, and compared."""
