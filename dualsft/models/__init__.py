"""Models and their files.

In: a Hugging Face folder or hub id. Out: a loaded model, its fingerprint, its stored weights.
"""
