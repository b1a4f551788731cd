"""Loading: weights that leave a layer out are refused; what is tied is not missing."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from core.faults import UserError
from core.pretrained import load_causal_lm
from launch import early


@pytest.mark.parametrize("name", tiny_models.configs())
def test_a_whole_model_loads_as_it_was_saved(name, tmp_path):
    saved = tiny_models.make_model(name)
    saved.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in saved.state_dict().items())


@pytest.mark.parametrize(("name", "part"), [("qwen3-untied", "lm_head"), ("llama-tied", "layers.0.mlp.up_proj")])
def test_weights_without_a_layer_are_refused_by_its_name(name, part, tmp_path):
    tiny_models.make_model(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kept = {key: tensor for key, tensor in tensors.items() if part not in key}
    assert len(kept) == len(tensors) - 1
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"model.path = .*: the weights have no \S*{part}\.weight, which would be random"
    ):
        load_causal_lm(str(tmp_path), torch.float32)


def test_the_model_types_read_from_the_source_of_transformers_are_those_it_has():
    """Otherwise a model that loads would be refused early, or the check would say nothing."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert early.causal_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
