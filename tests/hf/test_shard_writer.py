"""Files of a bounded size, and an index that says where each tensor is."""

import torch
from hf_models import read_weights

from megatron_llep.training.hf.shard_writer import ShardWriter
from megatron_llep.training.hf.weight_files import list_tensors


def write(folder, tensors, max_file_bytes):
    writer = ShardWriter(folder, max_file_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def test_large_models_are_cut_between_tensors(tmp_path):
    tensors = {f"t{i}": torch.full((10, i + 1), float(i)) for i in range(5)}  # 40 to 200 bytes
    write(tmp_path, tensors, max_file_bytes=250)
    names = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "model.safetensors.index.json",
    ]
    stored = list_tensors("--hf-load", tmp_path)
    assert [stored[f"t{i}"].file.name for i in range(5)] == [names[0]] * 3 + names[1:]
    read = read_weights(tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_small_models_are_one_file_without_an_index(tmp_path):
    write(tmp_path, {"a": torch.ones(3), "b": torch.zeros(2, 2).t()}, max_file_bytes=1000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(list_tensors("--hf-load", tmp_path)) == {"a", "b"}
