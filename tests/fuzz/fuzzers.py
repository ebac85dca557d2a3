"""The table of fuzzers."""

from tests.fuzz.configs import CONFIGS
from tests.fuzz.deltas import DELTAS
from tests.fuzz.records import RECORDS
from tests.fuzz.selections import MANIFESTS, SELECTIONS
from tests.fuzz.sources import SOURCES
from tests.fuzz.templates import TEMPLATES
from tests.fuzz.tokenizers import TOKENIZERS

FUZZERS = {
    "records": RECORDS,
    "sources": SOURCES,
    "templates": TEMPLATES,
    "tokenizers": TOKENIZERS,
    "manifests": MANIFESTS,
    "selections": SELECTIONS,
    "deltas": DELTAS,
    "configs": CONFIGS,
}
"""Name -> fuzzer."""
