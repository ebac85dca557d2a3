"""The embedded model and data, the configurations of jobs on them, controls for a selection, and the table.

config.yaml    the quick start: records extracted from sentences (``assets/records``)
gsm8k.yaml     maths problems, which a model this small does not learn to solve (``assets/data``)
"""

from pathlib import Path

_HERE = Path(__file__).parent
ASSETS = _HERE / "assets"
MODEL = ASSETS / "model"
CONFIG, GSM8K_CONFIG = _HERE / "config.yaml", _HERE / "gsm8k.yaml"
GSM8K, RECORDS = ASSETS / "data", ASSETS / "records"
"""Folders, each with a pool, a validation set and held-out rows."""
GENERAL = GSM8K / "test_general.jsonl"
"""Held-out rows of the tasks that the base model knows."""
