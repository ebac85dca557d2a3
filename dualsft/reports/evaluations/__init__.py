"""The sections about evaluations: models side by side on the same data, and what the trained ones forgot."""
