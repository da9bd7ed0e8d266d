"""One training step in PyTorch, written from its description, on tiny modules: the oracle for ours.

diffusers' UNet, VAE, schedules and schedulers, transformers' text encoders, torch's AdamW and clipping; in float64, so
that what differs is our rounding alone.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import Encoder
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from parity import assert_parity
from published import randomise, text_encoder
from torch import nn
from torch_aligner import TorchAligner
from torch_pipeline import SCHEDULE
from training_case import (
    GROUPS,
    POOLED,
    TEXT_WIDTH,
    TIME_IDS,
    VAE_CHANNELS,
    make_batch,
    make_step,
    model_config,
    train_config,
)

from faithdiff_jax.models.parts import numbered, part_shapes
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.weights import rules
from faithdiff_jax.weights.keymap import KeyMap, Rule, compare


class TorchModel(nn.Module):
    """The networks of `training_case.model_config`; all parameters random, zero-initialised layers and norms too."""

    def __init__(self, widths: tuple[int, ...], resnets: int = 1):
        super().__init__()
        torch.manual_seed(0)
        self.config = model_config(widths=widths, resnets=resnets)
        finer = len(widths) - 1
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=widths,
            layers_per_block=resnets,
            down_block_types=("DownBlock2D",) * finer + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * finer,
            transformer_layers_per_block=[2] * (finer + 1),
            attention_head_dim=[2] * (finer + 1),
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_IDS,
            projection_class_embeddings_input_dim=POOLED + 6 * TIME_IDS,
            norm_num_groups=GROUPS,
            use_linear_projection=True,
        )
        self.aligner = TorchAligner(VAE_CHANNELS[-1], widths[0])
        levels = len(VAE_CHANNELS)
        encoder = {
            "block_out_channels": VAE_CHANNELS,
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "layers_per_block": 1,
            "norm_num_groups": GROUPS,
        }
        self.vae = diffusers.AutoencoderKL(
            **encoder, up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, scaling_factor=0.13025
        )
        self.lq_encoder = Encoder(**encoder, out_channels=4, double_z=True)
        self.lq_encoder.conv_norm_out = self.lq_encoder.conv_act = self.lq_encoder.conv_out = nn.Identity()
        self.text_encoders = nn.ModuleList(
            [text_encoder(TEXT_WIDTH, 2), text_encoder(TEXT_WIDTH, 2, projection=POOLED)]
        )
        randomise(self)
        self.double()
        self.requires_grad_(False)

    def rules(self, part: str) -> list[Rule]:
        """Those of a part."""
        return rules.of_part(part, self.config)

    def published(self) -> dict[str, dict[str, nn.Parameter]]:
        """Our part -> published tensor name -> parameter."""
        parts = {
            "unet": dict(self.unet.named_parameters()),
            "alignment": dict(self.aligner.named_parameters()),
            "lq_encoder": {f"denoise_encoder.{name}": value for name, value in self.lq_encoder.named_parameters()},
            "vae": dict(self.vae.named_parameters()),
        }
        names = numbered("text_encoder", len(self.text_encoders))
        for part, encoder in zip(names, self.text_encoders, strict=True):
            # transformers leaves the first component out of one class's names, and puts it back in files.
            parts[part] = {
                name if name.startswith("text_") else f"text_model.{name}": value
                for name, value in encoder.named_parameters()
            }
        return parts

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, lq: torch.Tensor, given: dict, group: int
    ) -> torch.Tensor:
        """The noise (B, 4, h, w) from LQ pictures (B, 3, H, W) in [-1, 1]; `given` is the text for the UNet."""
        features = self.lq_encoder(lq).split(group)

        def align(module, args, first):
            return torch.cat([self.aligner(*pair) for pair in zip(first.split(group), features, strict=True)])

        hook = self.unet.conv_in.register_forward_hook(align)
        try:
            return self.unet(noisy, timesteps, **given).sample
        finally:
            hook.remove()

    def loss(self, batch: Mapping[str, np.ndarray], loss: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss and the errors it is made of, (B, 4, h, w).

        The aligner's attention goes over `group` samples at a time, as it does on a device with a batch of so many.
        """
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in batch.items()}
        hq, lq, noise, vae_noise = (
            tensors[name].permute(0, 3, 1, 2).double() for name in ("hq", "lq", "noise", "vae_noise")
        )
        timesteps = tensors["timesteps"]
        distribution = self.vae.encode(hq).latent_dist
        latents = (distribution.mean + distribution.std * vae_noise) * self.vae.config.scaling_factor
        noisy = DDPMScheduler(**SCHEDULE).add_noise(latents, noise, timesteps)
        # Where the aligner alone trains, torch 2.13 crashes on the way back unless its input needs a gradient too.
        predicted = self.predict(noisy, timesteps, lq.requires_grad_(), self.text(tensors), group)
        error = predicted - self.target(latents, noise, timesteps)
        return (error.abs() if loss == "l1" else error.square()).mean(), error

    def text(self, tensors: Mapping[str, torch.Tensor]) -> dict:
        """What the UNet is given beside latents and timesteps."""
        hidden = []
        for i, encoder in enumerate(self.text_encoders):
            output = encoder(tensors[f"token_ids_{i}"].long(), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        added = {"text_embeds": output.text_embeds, "time_ids": tensors["time_ids"].double()}
        return {"encoder_hidden_states": torch.cat(hidden, dim=-1), "added_cond_kwargs": added}

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What should be predicted."""
        return noise


class TorchSD21(TorchModel):
    """As SD 2.1: one text encoder's final states, transformers at the finer level, no added embedding."""

    def __init__(self, prediction: str):
        super().__init__((16, 32))
        self.prediction = prediction
        text = dataclasses.replace(self.config.text_encoders[0], activation="gelu", output="final")
        sizes = {"transformer_depth": (1, 0), "mid_transformer_depth": 1, "heads": (1, 2), "pooled_dim": None}
        self.config = dataclasses.replace(
            self.config,
            unet=dataclasses.replace(self.config.unet, **sizes, context_dim=TEXT_WIDTH),
            text_encoders=(text,),
            schedule=dataclasses.replace(self.config.schedule, prediction=prediction),
        )
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=[1, 2],
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=GROUPS,
            use_linear_projection=True,
            upcast_attention=prediction == "v_prediction",
        )
        self.text_encoders = nn.ModuleList([text_encoder(TEXT_WIDTH, 2, activation="gelu")])
        for module in (self.unet, self.text_encoders):
            randomise(module)
            module.double().requires_grad_(False)

    def text(self, tensors: Mapping[str, torch.Tensor]) -> dict:
        return {"encoder_hidden_states": self.text_encoders[0](tensors["token_ids_0"].long()).last_hidden_state}

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction == "epsilon":
            return noise
        return DDPMScheduler(**SCHEDULE).get_velocity(latents, noise, timesteps)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step of `train` did; tensors by published name, as before they were clipped."""

    loss: float
    smallest_error: float
    """Of all predictions, how near the loss came to its kink."""
    norm: float
    rates: tuple[float, ...]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]


def train(model: TorchModel, config: TrainConfig, batches: Sequence[Mapping[str, np.ndarray]], group: int):
    """Initial parameters by published name, and a Record of each step, of a copy of `model`.

    A group's patterns must be whole parts, such as `unet.*`.
    """
    model = copy.deepcopy(model)
    parts = model.published()
    settings = config.optimizer
    groups = []
    for one in config.groups.values():
        named = {name: value for pattern in one.parameters for name, value in parts[pattern.removesuffix(".*")].items()}
        groups.append({"params": list(named.values()), "lr": one.learning_rate, "weight_decay": one.weight_decay})
    chosen = {id(parameter) for entry in groups for parameter in entry["params"]}
    trained = {name: value for part in parts.values() for name, value in part.items() if id(value) in chosen}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    schedule = learning_rates(config, optimizer)
    initial = snapshot(trained)
    records = []
    for batch in batches:
        optimizer.zero_grad()
        loss, error = model.loss(batch, config.loss, group)
        loss.backward()
        gradients = {name: value.grad.numpy().copy() for name, value in trained.items()}
        norm = nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        rates = tuple(entry["lr"] for entry in optimizer.param_groups)
        optimizer.step()
        schedule.step()
        records.append(Record(loss.item(), error.abs().min().item(), norm.item(), rates, gradients, snapshot(trained)))
    return initial, records


def learning_rates(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """diffusers' schedule of the name that the config gives."""
    warmup = config.optimizer.warmup
    if config.optimizer.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    return get_cosine_schedule_with_warmup(optimizer, warmup, config.steps)


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in parameters.items()}


@functools.cache
def keymap(model: TorchModel, part: str) -> KeyMap:
    """The rules of one part of a tiny model, as conversion and export use them."""
    return KeyMap(model.rules(part), part_shapes(model.config, part))


def to_ours(model: TorchModel) -> dict[str, np.ndarray]:
    """Every parameter by our dotted path, part first, float32."""
    ours = {}
    for part, tensors in model.published().items():
        rules_of_part = keymap(model, part)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert not compare(rules_of_part.published_shapes(), found), part
        read = rules_of_part.read(lambda name, tensors=tensors: tensors[name].numpy().astype(np.float32))
        ours |= {f"{part}.{path}": array for path, array in read}
    return ours


def to_published(model: TorchModel, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by our dotted path -> by published name, each layer of a stack apart."""
    published = {}
    for part in dict.fromkeys(path.partition(".")[0] for path in arrays):
        for entry in keymap(model, part).entries:
            if f"{part}.{entry.path}" in arrays:
                array = np.asarray(arrays[f"{part}.{entry.path}"])
                published |= dict(keymap(model, part).write(entry, array))
    return published


LIMIT = 1e-4
# Of the model's largest gradient, what rounding may leave of a tensor's.
FLOOR = 1e-7
KINK = 1e-5  # see test_parity_training
FEW = 2


def assert_gradients(
    model: TorchModel, arrays: Mapping[str, np.ndarray], stage: Mapping[str, object], without_effect: set[str]
) -> None:
    """Hold our loss, and our gradient of every tensor that trains in a stage, to those of a model in PyTorch.

    Args:
        model: the model.
        arrays: its parameters as ours, `to_ours`.
        stage: groups and frozen parameters.
        without_effect: published names of tensors whose gradients are mathematically zero; they must be so here.
    """
    config = train_config(stage, batch=FEW, rematerialisation="none")
    batch = make_batch(0, FEW)
    _, (record,) = train(model, config, [batch], 1)
    assert record.smallest_error > KINK, "choose another seed: this one is too near the kink of L1"

    step = make_step(config, model.config)
    trained = {path: jnp.asarray(array) for path, array in arrays.items() if path in step.labels}
    frozen = {path: jnp.asarray(array) for path, array in arrays.items() if path not in step.labels}
    gradients, seen = jax.jit(step.gradients)(trained, frozen, batch, jnp.zeros((), jnp.int32))
    assert_parity(np.mean(seen["losses"]), record.loss, 1e-5)
    ours = to_published(model, jax.device_get(gradients))
    assert ours.keys() == record.gradients.keys()
    most = max(_largest(gradient) for gradient in record.gradients.values())
    for path, gradient in record.gradients.items():
        error = _largest(ours[path] - gradient)
        assert error <= LIMIT * _largest(gradient) + FLOOR * most, f"{path}: {error / _largest(gradient):.1e}"
    without = {path for path, gradient in record.gradients.items() if _largest(gradient) < 1e-6 * most}
    assert without == (without_effect & ours.keys())


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())
