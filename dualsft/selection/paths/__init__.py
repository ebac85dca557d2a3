"""Scores along a path, in place of one scoring checkpoint: walked once, kept in files, integrated piece by piece.

In: the loaded model, the options under ``model.path`` (`settings.py`) and a path's rule (`dualsft.paths`). Out: what
scores weights and examples along it (`run.py`), as `dualsft.selection.scoring` does at one checkpoint.
"""
