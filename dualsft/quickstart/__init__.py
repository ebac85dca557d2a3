"""The quick start: an embedded base model and data, and the whole job on them."""
