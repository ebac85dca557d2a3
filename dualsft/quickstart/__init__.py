"""The quick start: an embedded base model and data, and a selection and fine-tunes with them."""
