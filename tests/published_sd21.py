"""The configuration files of the published SD 2.1 folders, without the keys that no network depends on.

The model for 768 pixels (`stable-diffusion-2-1`) predicts the velocity, the one for 512 (`-base`) the noise; their
networks have the same shapes.
"""

from benchmarks import published_sdxl

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0.dev0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": True,
    "use_linear_projection": True,
}
# The network of SDXL's, from before there were these two keys: SD's factor is what they default to.
VAE = {key: value for key, value in published_sdxl.VAE.items() if key not in ("force_upcast", "scaling_factor")} | {
    "sample_size": 768
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "vocab_size": 49408,
}


def scheduler(prediction: str) -> dict[str, object]:
    """`scheduler_config.json`: no word about how timesteps are spaced, which is "leading" for these classes."""
    settings = {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    kind = "DDIMScheduler" if prediction == "v_prediction" else "PNDMScheduler"
    return {"_class_name": kind, "_diffusers_version": "0.8.0", **settings}


def unet(prediction: str) -> dict[str, object]:
    """`unet/config.json`: the model for 512 says nothing about its attention's precision."""
    if prediction == "v_prediction":
        return UNET
    return {key: value for key, value in UNET.items() if key != "upcast_attention"} | {"sample_size": 64}
