"""The sections about fits: what was trained, how the losses went, and what the model learnt and forgot."""
