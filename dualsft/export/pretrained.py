"""Writing Hugging Face folders: a model's weights, and what its base has beside them."""

import shutil
from pathlib import Path

from dualsft.data.tokenizer import load_tokenizer
from dualsft.models import PreTrainedModel
from dualsft.models.loading import model_folder
from dualsft.sharding.save import save_sharded
from dualsft.sharding.shard_model import is_sharded

GENERATION = "generation_config.json"


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as a Hugging Face folder; of a sharded one every rank calls this."""
    if is_sharded(model):
        save_sharded(model, folder)
    else:
        model.save_pretrained(folder)


def copy_companions(base: str, folder: Path) -> None:
    """Give a folder the base's tokenizer, and its generation settings as they stand.

    Raises:
        UserError: if the base has no tokenizer that can be loaded.
    """
    load_tokenizer(base).save_pretrained(folder)
    settings = model_folder(base) / GENERATION
    if settings.is_file():
        shutil.copyfile(settings, folder / GENERATION)
