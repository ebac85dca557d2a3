import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dualsft.errors import UserError
from dualsft.models.loading import Dtype, load_model, weight_files
from dualsft.sharding import load as loading
from dualsft.sharding.groups import shard_mesh
from dualsft.sharding.load import copy_weights, load_sharded
from dualsft.sharding.shards import local_shard
from tests.cases import ARCHITECTURES, make
from tests.models.test_loading import DAMAGES, change_weights, shard
from tests.world.models import save_tiny_model
from tests.world.ranks import run_on_ranks

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Architecture -> a model folder in float32."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: str(root / name) for name in ARCHITECTURES}
    for name, path in paths.items():
        make(name, torch.float32).save_pretrained(path)
    return paths


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def named(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_model(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Parameters, buffers, ties, configurations and modes are the same, to the last bit."""
    tensors, others = named(expected), named(found)
    assert list(tensors) == list(others)
    for name, tensor in tensors.items():
        other = whole(others[name])
        assert (other.dtype, other.requires_grad) == (tensor.dtype, tensor.requires_grad), name
        assert other.device == tensor.device
        assert torch.equal(other, tensor), name
    assert found.training == expected.training
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.config.name_or_path == expected.config.name_or_path
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    ids = torch.arange(24).view(2, 12)
    for model in (found, expected):
        model.set_experts_implementation("eager")  # tiny experts are too narrow for the others in bfloat16
    logits = [model(input_ids=ids, use_cache=False).logits for model in (found, expected)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def _same_models(paths: Mapping[str, str], dtypes: Sequence[Dtype]) -> None:
    for path in paths.values():
        for dtype in dtypes:
            expected = load_model(path, dtype)
            if _has_a_module_of_several_types(expected):  # RWKV in bfloat16, in some releases
                assert "owns weights of the types" in _refusal(partial(load_sharded, path, shard_mesh("cpu"), dtype))
                continue
            found = load_sharded(path, shard_mesh("cpu"), dtype)
            assert all(isinstance(parameter, DTensor) for parameter in found.parameters())
            assert_same_model(found, expected)


def _has_a_module_of_several_types(model: PreTrainedModel) -> bool:
    return any(len({p.dtype for p in module.parameters(recurse=False)}) > 1 for module in model.modules())


def test_every_architecture_loads_as_it_does_whole(folders: dict[str, str]) -> None:
    """On two ranks, in the stored type and cast to bfloat16; mixtral's experts lie one by one in the files."""
    assert any("experts.1.w1" in name for name in weight_files(Path(folders["mixtral"])))
    run_on_ranks(2, _same_models, folders, ["auto", "bfloat16"])


def _ties(paths: Mapping[str, str]) -> list[bool]:
    _same_models(paths, ["auto"])
    return [is_tied(load_sharded(path, shard_mesh("cpu"))) for path in paths.values()]


def is_tied(model: Any) -> bool:
    """The head's weights are the embedding's."""
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_stored_beside_the_embedding_is_tied_as_in_the_whole_model(tmp_path: Path) -> None:
    """What the loader decides by the weights' values, whether they are equal, comes out the same."""
    paths = {name: save_tiny_model(tmp_path / name) for name in ("equal", "other")}
    change_weights(Path(paths["equal"]), lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    change_weights(Path(paths["other"]), lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    expected = [is_tied(load_model(path)) for path in paths.values()]  # by no release if they differ
    assert not expected[1]
    assert run_on_ranks(2, _ties, paths) == [expected] * 2


def _on_four(paths: Mapping[str, str]) -> None:
    _same_models(paths, ["float32"])
    model = load_sharded(paths["mixtral"], shard_mesh("cpu"), cpu_offload=True)
    places = [local_shard(parameter.detach()).data_ptr() for parameter in model.parameters()]
    local_shard(model.model.norm.weight.detach()).zero_()
    assert model(input_ids=torch.tensor([[3, 4]])).logits.abs().max() == 0
    assert [local_shard(parameter.detach()).data_ptr() for parameter in model.parameters()] == places


def test_four_ranks_some_without_a_row(folders: dict[str, str], tmp_path: Path) -> None:
    """Three experts leave a rank none; files may be several; a shard is the model's memory from the start."""
    save_tiny_model(tmp_path / "several")
    shard(tmp_path / "several")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    run_on_ranks(4, _on_four, {"mixtral": folders["mixtral"], "several files": str(tmp_path / "several")})


def _copied(path: str, other: str, different: str) -> None:
    """Each rank has the other checkpoint's rows, in its own memory, and the model its own type."""
    cases: list[tuple[Dtype, bool]] = [("auto", True), ("bfloat16", True), ("float32", False)]
    for dtype, sharded in cases:
        model = load_sharded(path, shard_mesh("cpu"), dtype) if sharded else load_model(path, dtype)
        places = [local_shard(parameter.detach()).data_ptr() for parameter in model.parameters()]
        copy_weights(model, other)
        expected = dict(load_model(other, dtype).named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(whole(parameter), expected[name]), name
        assert [local_shard(parameter.detach()).data_ptr() for parameter in model.parameters()] == places
        assert "has other weights, by name or shape, than the model" in _refusal(
            partial(copy_weights, model, different)
        )


def test_a_checkpoint_is_copied_into_a_loaded_model(folders: dict[str, str], tmp_path: Path) -> None:
    """Experts that the files name one by one among it; sharded or whole, and another model's is refused."""
    other = load_model(folders["mixtral"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.25)
    other.save_pretrained(tmp_path / "other")
    run_on_ranks(2, _copied, folders["mixtral"], str(tmp_path / "other"), save_tiny_model(tmp_path / "different"))


def _refusal(load: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    return str(caught.value)


def _same_refusals(paths: Mapping[str, str]) -> None:
    mesh = shard_mesh("cpu")
    for path in paths.values():
        assert _refusal(partial(load_sharded, path, mesh)) == _refusal(partial(load_model, path))


def _refused_on_one(path: str) -> str:
    def unreadable(_: Tensor) -> None:
        if distributed.get_rank() == 1:
            raise OSError("the disk is gone")

    with mock.patch.object(loading, "first_row", unreadable if distributed.get_rank() == 1 else loading.first_row):
        return _refusal(lambda: load_sharded(path, shard_mesh("cpu")))


def _refused(paths: Mapping[str, str], sound: str) -> str:
    _same_refusals(paths)
    return _refused_on_one(sound)


def test_a_damaged_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    """In the words of the whole model's loader; a file that one rank cannot read ends them all."""
    paths = {damage: save_tiny_model(tmp_path / damage) for damage in [*DAMAGES, "sound"]}
    for damage, (damaging, _) in DAMAGES.items():
        damaging(Path(paths[damage]))
    sound = paths.pop("sound")
    told = run_on_ranks(2, _refused, paths, sound)
    assert told == [f"The weights in {sound} cannot be read: the disk is gone"] * 2


class CountedFile:
    """A file that counts the bytes that are read from it, of tensors of more than one dimension."""

    read = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file = safe_open(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> Any:
        """A slice that counts."""
        return CountedSlice(self._file.get_slice(name))


class CountedSlice:
    """Part of a file."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, rows: Any) -> Tensor:
        tensor: Tensor = self._stored[rows]
        CountedFile.read += tensor.nbytes
        return tensor


def _bytes_read(paths: Sequence[str]) -> list[int]:
    counts = []
    for path in paths:
        CountedFile.read = 0
        with mock.patch.object(loading, "safe_open", CountedFile):
            load_sharded(path, shard_mesh("cpu"), "bfloat16")
        counts.append(CountedFile.read)
    return counts


def test_each_byte_is_read_once(folders: dict[str, str]) -> None:
    """By the rank that keeps it, however experts lie in the files, and though the model is cast."""
    paths = [folders[name] for name in ("llama", "gpt2", "mixtral", "qwen3 moe", "gpt-oss")]
    sizes = [sum(parameter.nbytes for parameter in load_model(path).parameters()) for path in paths]
    read = [sum(counts) for counts in zip(*run_on_ranks(2, _bytes_read, paths), strict=True)]
    assert read == pytest.approx(sizes, rel=0.02)


class PeakMemory:
    """Watches how much anonymous memory (what is no file's) this process holds more than in the beginning."""

    def __enter__(self) -> "PeakMemory":
        self.peak, self._start, self._done = 0, _anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _anonymous_bytes() - self._start)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def _peaks(path: str, warm_up: str) -> tuple[int, int]:
    mesh = shard_mesh("cpu")
    load_sharded(warm_up, mesh)
    with PeakMemory() as of_shards:
        model = load_sharded(path, mesh, "float32")
    del model
    with PeakMemory() as of_whole:
        load_model(path, "float32")
    return of_shards.peak, of_whole.peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by Linux")
def test_no_rank_ever_holds_the_model(folders: dict[str, str], tmp_path: Path) -> None:
    """A rank of two holds three quarters of it at most, at any time, where the whole model's loader holds all."""
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_attention_heads=4, **sizes))
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.bfloat16().save_pretrained(tmp_path / "model")
    for of_shards, of_whole in run_on_ranks(2, _peaks, str(tmp_path / "model"), folders["llama"]):
        assert 0.45 * size < of_shards < 0.75 * size
        assert of_whole > 0.95 * size
