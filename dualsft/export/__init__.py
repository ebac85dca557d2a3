"""From a base model and a delta to a checkpoint or an adapter, and back.

In: Hugging Face folders and deltas. Out: the same.
"""
