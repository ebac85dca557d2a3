"""From a base model and a delta to a checkpoint or an adapter, and back.

In: Hugging Face model folders and deltas. Out: a delta, a model folder or a PEFT adapter, each with a record of how it
was made (`provenance`), which the model card shows.
"""
