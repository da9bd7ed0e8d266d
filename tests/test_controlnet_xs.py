"""ControlNet-XS: the sizes that a published one has, and those that are refused. See `test_parity_baselines`, too."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_baselines import TRAINED_HINT, XS, TrainedControlNetXS

from faithdiff_jax.config import from_dict
from faithdiff_jax.errors import InputError
from faithdiff_jax.models.alignment import AlignmentConfig
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.unet_config import UNetConfig
from faithdiff_jax.models.vae import EncoderConfig
from faithdiff_jax.weights.published_baselines import steering_config


def test_sizes_of_a_published_one(tmp_path):
    model = TrainedControlNetXS()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.control.state_dict().items()}
    model.control.save_config(tmp_path)
    file, unet = tmp_path / "config.json", model.config.unet
    wanted = (
        AlignmentConfig(kind="controlnet_xs", xs=XS),
        EncoderConfig(channels=TRAINED_HINT, out_channels=XS.channels[0], norm_groups=1),
    )
    assert steering_config(shapes, file, unet) == wanted
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"conditioning_channel_order": "bgr"}), encoding="utf-8")
    with pytest.raises(InputError, match=r'conditioning_channel_order is "bgr": supported is "rgb"$'):
        steering_config(shapes, file, unet)
    file.unlink()
    with pytest.raises(InputError, match="no such file, which says how many attention heads a ControlNet-XS has"):
        steering_config(shapes, file, unet)


@pytest.mark.parametrize(
    ("xs", "message"),
    [
        ({"channels": [32, 64]}, r"heads is \(1, 1, 2\): needs one number per level, 2 as in channels"),
        ({"heads": [1, 1, 3]}, "heads has 3: must divide its level's channels, 128"),
        ({"time_embedding_mix": 1.5}, r"time_embedding_mix is 1.5: must be from 0 to 1, or null"),
        ({"time_embedding_mix": float("nan")}, "time_embedding_mix is nan: must be from 0 to 1, or null"),
    ],
)
def test_sizes_that_are_refused(xs, message):
    with pytest.raises(InputError, match=message):
        from_dict(FaithDiffConfig, {"alignment": {"kind": "controlnet_xs", "xs": xs}}, "here")


NAMES = [
    "control_to_base_for_conv_in.weight",
    *(f"down_blocks.{level}.ctrl_to_base.0.weight" for level in range(3)),
    *(f"controlnet_cond_embedding.{name}.weight" for name in ("conv_in", "conv_out", "blocks.1", "blocks.3")),
]
KEYS = ["num_attention_heads", "time_embedding_mix", "learn_time_embedding", "max_norm_num_groups", "_class_name"]
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(-2, 2) | st.text(max_size=3) | st.just([1, 2, 4])
)
SHAPES = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)


@settings(max_examples=50)
@given(shapes=st.dictionaries(st.sampled_from(NAMES), SHAPES), data=st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_nonsense(tmp_path_factory, shapes, data):
    """Whatever names, shapes and settings a file has: sizes of ours, or one line of what is wrong."""
    file = tmp_path_factory.getbasetemp() / "control.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    message = ""
    try:
        steering_config(shapes, file, UNetConfig())
    except (InputError, ValueError) as error:  # the converter says ValueErrors as InputErrors
        message = str(error)
    assert "\n" not in message
