from typing import Any

SelectionSettings = Any
