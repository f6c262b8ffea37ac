"""The Vision Transformer: how it is made (model), what of it can be cut (anatomy), what it costs (cost)."""
