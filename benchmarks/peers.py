"""dualsft beside bergson on the same work: what scoring costs, how exact the scores are, and what removing rows does.

    python -m venv bergson && bergson/bin/pip install torch==2.13.0    a CPU build where there is no GPU
    bergson/bin/pip install --no-deps bergson==2.5.1
    bergson/bin/pip install accelerate datasets jinja2 jaxtyping ml_dtypes natsort numpy scipy peft petname pyarrow \
        pyyaml simple-parsing torchopt "transformers>=5.0" "huggingface-hub>=1.13.0"
    OMP_NUM_THREADS=1 python benchmarks/peers.py --bergson_python bergson/bin/python    about half an hour on one core

bergson declares torchvision, torchaudio and bitsandbytes, which nothing here needs. The work is the quick start's: its
model, the first rows of its pool, its validation rows as the target, the same tokens with the responses supervised.
Three tables, also in ``peers.json``; a second start goes on where the first one stopped, with more rounds or seeds too.

Cost: medians over rounds in which every setting runs once; all of a command counts, start and loading included. The
milliseconds of a row are the difference between the pool and a few rows of it. Agreement: the cosine and Spearman's
correlation with float64 autograd over one example at a time, both over the weights that the tool covers and over all,
with the tool's own loss (the mean or the sum over tokens). Removal: the highest scored rows are taken out of the pool,
the model is trained on the others, and the target's held-out loss is compared with the same seed's without removal.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peer_removal import Training
from peer_settings import Peers
from peer_tables import agreement_table, cost_table, markdown, removal_table
from peer_tools import versions
from peer_work import kept

PACKAGES = ["torch", "transformers", "datasets"]
TABLES = {"cost": cost_table, "agreement": agreement_table, "removal": removal_table}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bergson_python", type=Path, required=True, help="interpreter of bergson's environment")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/peers"))
    parser.add_argument("--rows", type=int, default=640, help="of the pool")
    parser.add_argument("--few", type=int, default=64, help="rows of the runs that tell what a start costs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    training = Training(options.steps, options.batch, options.rate)
    peers = Peers(options.output_dir.absolute(), options.bergson_python.absolute(), options, training)
    work = {name: getattr(options, name) for name in ("rows", "few", "steps", "batch", "rate")}
    if kept(peers.folder / "options.json", lambda: work) != work:
        parser.error(f"{peers.folder} is of other options; give another --output_dir")
    here = versions(Path(sys.executable), ["dualsft", *PACKAGES])
    found: dict[str, Any] = {"versions": [here, versions(peers.python, ["bergson", *PACKAGES])]}
    print(*found["versions"], sep="\n", flush=True)
    for name, table in TABLES.items():
        found[name] = table(peers)
        print(f"\n{name}\n\n{markdown(found[name])}\n", flush=True)
        (peers.folder / "peers.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
