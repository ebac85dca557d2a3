"""The sections about selections: what was asked, what came out, where the weights are, which examples were chosen."""
