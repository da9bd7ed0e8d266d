"""One training step: a batch on the mesh -> loss -> gradients -> groups of AdamW -> moving average.

    hq --VAE--> latents; with noise of a timestep --> noisy
    lq --LQ encoder--> features; token ids --text encoders--> context, pooled
    noisy, features, context, pooled --aligner + UNet--> predicted noise --L1--> loss

The step is a pure function of (state, frozen parameters, batch). What it draws (timesteps, noise, VAE samples) comes
from the seed, the step and each sample's row in the global batch: devices, processes and accumulation change nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Key

from faithdiff_jax.diffusion import schedule
from faithdiff_jax.models.backend import batches_placed
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.models.layers import rematerialise
from faithdiff_jax.models.parts import Networks, numbered, unflatten
from faithdiff_jax.models.vae import VAE
from faithdiff_jax.sharding import batch_constraint, batch_places, parameter_sharding
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.eight_bit import is_eight_bit
from faithdiff_jax.training.lora import merge_adapters
from faithdiff_jax.training.losses import mean_error, picture_loss
from faithdiff_jax.training.optimizer import (
    Flat,
    all_groups,
    group_norms,
    learning_rate,
    make_optimizer,
    update_average,
)

GUIDANCE_KEY = 0x77656967  # far from the numbers that a step's other keys have
State = dict[str, Any]
Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is random in a step, for b samples.

    Attributes:
        timesteps: (b,) int32, even over 0..train_steps - 1.
        noise: (b, h, w, c), standard normal plus the noise offset: added to the latents, and to be predicted.
        vae_noise: (b, h, w, c), standard normal: which sample of the VAE's latent distribution is taken.
        guidance: (b,), the weight that each sample feeds to the UNet; None for a UNet that is fed none.
    """

    timesteps: Int[Array, " b"]
    noise: Float[Array, "b h w c"]
    vae_noise: Float[Array, "b h w c"]
    guidance: Float32[Array, " b"] | None = None


def row_keys(seed: int, step: Int[Array, ""] | int, rows: Int[Array, " b"]) -> Key[Array, " b"]:
    """One random key for each sample, by its row in the global batch."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), row))(rows)


def guidance_keys(seed: int, step: Int[Array, ""] | int, rows: Int[Array, " b"]) -> Key[Array, " b"]:
    """As `row_keys`, for what guidance is drawn with."""
    return jax.vmap(lambda key: jax.random.fold_in(key, GUIDANCE_KEY))(row_keys(seed, step, rows))


def draw(
    seed: int,
    step: Int[Array, ""] | int,
    rows: Int[Array, " b"],
    shape: tuple[int, int, int],
    train_steps: int,
    noise_offset: float,
) -> Draws:
    """Draw for the samples in the given rows of the global batch; `shape` is a latent's (h, w, c)."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        for_timestep, for_noise, for_offset, for_vae = jax.random.split(key, 4)
        offset = noise_offset * jax.random.normal(for_offset, (1, 1, shape[-1]))
        return (
            jax.random.randint(for_timestep, (), 0, train_steps),
            jax.random.normal(for_noise, shape) + offset,
            jax.random.normal(for_vae, shape),
        )

    return Draws(*jax.vmap(one)(row_keys(seed, step, rows)))


class TrainStep:
    """The compiled step of a run, and the pieces it is made of.

    Attributes:
        optimizer: the optax transformation over the flat dict of trained parameters.
        run: (state, frozen, batch) -> (state, metrics), jitted; the state's memory is reused.
        loss: (trained, frozen, batch, draws) -> (mean loss, losses (b,)), for a batch without accumulation.
    """

    def __init__(self, config: TrainConfig, model: FaithDiffConfig, labels: Mapping[str, str], mesh: Mesh | None):
        self.config, self.model, self.labels, self.mesh = config, model, dict(labels), mesh
        self.dtype = jnp.dtype(config.dtype)
        self.networks = Networks(model, self.dtype)
        self.pictures = picture_loss(config)
        self.optimizer = make_optimizer(config, labels)
        self._constrain = batch_constraint(mesh)
        self.run = jax.jit(self.update, donate_argnums=0)

    def init(self, trained: Flat) -> State:
        """The state before the first step; `trained` are float32 masters. Jit it with `shardings` to place it."""
        state = {
            "step": jnp.zeros((), jnp.int32),
            "trained": trained,
            "optimizer": self.optimizer.init(trained),
            "skipped": jnp.zeros((), jnp.int32),
            "skipped_in_a_row": jnp.zeros((), jnp.int32),
        }
        # A copy, since both are donated.
        return state | ({"ema": jax.tree.map(jnp.copy, trained)} if self.config.ema is not None else {})

    def frozen_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Path -> shape of the frozen parameters that a step takes; `shapes` are those of the whole model."""
        return {path: shape for path, shape in shapes.items() if path not in self.labels}

    def shardings(self, tree: Any) -> Any:
        """Where each leaf of a state, or of a flat dict, lies: split over `fsdp` by its shape."""
        mesh = self.mesh
        assert mesh is not None

        def place(leaf: Any) -> Any:
            return leaf.sharding(mesh) if is_eight_bit(leaf) else parameter_sharding(mesh, leaf.shape)

        return jax.tree.map(place, tree, is_leaf=is_eight_bit)

    def loss(
        self, trained: Flat, frozen: Flat, batch: Batch, draws: Draws
    ) -> tuple[Float32[Array, ""], Float32[Array, " b"]]:
        """Mean absolute (or squared) error of the predicted noise, or of `schedule.prediction` (paper, eq. 3).

        Args:
            trained: parameters in the dtype to compute in.
            frozen: the others.
            batch: hq, lq (b, H, W, 3) in [-1, 1], token_ids_0.. (b, 77), time_ids (b, 6).
            draws: what is random.

        Returns:
            The mean, and each sample's loss (b,), float32.
        """
        params = unflatten(merge_adapters(self.config.lora, frozen | trained))
        with rematerialise(self.config.rematerialisation):
            vae = self.networks.vae(params["vae"])
            moments = vae.moments(batch["hq"].astype(self.dtype))
            latents = jax.lax.stop_gradient(vae.sample(moments, draws.vae_noise))
            context, pooled = self.encode_text(params, batch)
            features = self.networks.lq_encoder(params["lq_encoder"])(batch["lq"].astype(self.dtype))
            forward = self.model.schedule, latents, draws.noise, draws.timesteps
            noisy = schedule.add_noise(*forward)
            denoiser = self.networks.denoiser({"unet": params["unet"], "alignment": params["alignment"]})
            texts = context, pooled, batch["time_ids"]
            predicted = denoiser(noisy, draws.timesteps, features, *texts, draws.guidance).astype(jnp.float32)
            losses = self.config.losses
            each = losses.latent * mean_error(self.config.loss, predicted, schedule.target(*forward))
            if self.pictures is not None:
                clean = schedule.to_clean(self.model.schedule, predicted, noisy, draws.timesteps)
                wanted = None
                if losses.guidance is not None and draws.guidance is not None:
                    wanted = jnp.equal(draws.guidance, losses.guidance[1])
                each += self.pictures(self.decode(vae, clean, batch), batch["hq"], wanted)
        return jnp.mean(each), each

    def decode(self, vae: VAE, latents: Float[Array, "b h w z"], batch: Batch) -> Float[Array, "b H W c"]:
        """The pictures (b, H, W, 3), about [-1, 1], that clean latents (b, h, w, z) stand for."""
        decoded = vae.decode(latents.astype(self.dtype))
        return decoded if self.model.decoder_output == "picture" else batch["lq"].astype(self.dtype) + decoded

    def encode_text(self, params: Mapping[Any, Any], batch: Batch) -> tuple[Float[Array, "b m d"], Float[Array, "b p"]]:
        """Context and pooled text of a batch's token ids; `params` by part."""
        names = numbered("text_encoder", len(self.model.text_encoders))
        return self.networks.encode_text(
            [params[name] for name in names], [batch[f"token_ids_{i}"] for i in range(len(names))]
        )

    def gradients(
        self, trained: Flat, frozen: Flat, batch: Batch, step: jax.Array
    ) -> tuple[Flat, dict[str, jax.Array]]:
        """Gradients of the mean loss over the whole batch, float32, and losses and timesteps of its samples.

        The batch is gone through in `accumulation` rounds. Each takes every so-manieth sample, so that all devices
        have their share of each round where they are.
        """
        rounds = self.config.accumulation
        # Copies in the compute dtype: half the traffic where parameters are gathered for each block.
        compute = {path: array.astype(self.dtype) for path, array in trained.items()}

        def one_round(part: Batch) -> tuple[Flat, dict[str, jax.Array]]:
            part = {name: self._constrain(array) for name, array in part.items()}
            draws = self._draw(part, step)
            with batches_placed(batch_places(self.mesh)):
                (_, losses), gradients = jax.value_and_grad(self.loss, has_aux=True)(compute, frozen, part, draws)
            gradients = {path: self._place(array.astype(jnp.float32)) for path, array in gradients.items()}
            return gradients, {"losses": losses, "timesteps": draws.timesteps}

        if rounds == 1:
            return one_round(batch)

        def accumulate(total: Flat, part: Batch) -> tuple[Flat, dict[str, jax.Array]]:
            gradients, seen = one_round(part)
            return jax.tree.map(jnp.add, total, gradients), seen

        zeros = {path: self._place(jnp.zeros(array.shape, jnp.float32)) for path, array in trained.items()}
        total, seen = jax.lax.scan(accumulate, zeros, {name: self._rounds(array) for name, array in batch.items()})
        return jax.tree.map(lambda array: array / rounds, total), jax.tree.map(jnp.ravel, seen)

    def update(self, state: State, frozen: Flat, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step; `run` is this, jitted.

        Args:
            state: see `init`.
            frozen: the frozen parameters.
            batch: the loader's, with `row` (B,), each sample's place in the global batch; optionally `timesteps`,
                `noise` and `vae_noise` to be used instead of drawn ones (see `Draws`).

        Returns:
            The new state, and loss, gradient norms, learning rates, each sample's loss and timestep, and how many
            steps were left out. A step whose loss or gradients are not finite changes no parameter.
        """
        step, trained = state["step"], state["trained"]
        gradients, seen = self.gradients(trained, frozen, batch, step)
        loss, norm = jnp.mean(seen["losses"]), optax.tree.norm(gradients)
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], trained)
        applied = optax.apply_updates(trained, updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new, old = {"trained": applied, "optimizer": optimizer}, {key: state[key] for key in ("trained", "optimizer")}
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        if self.config.ema is not None:
            new["ema"] = update_average(self.config.ema, state["ema"], applied, step, finite)
        new["step"] = step + 1
        new["skipped"] = state["skipped"] + ~finite
        new["skipped_in_a_row"] = jnp.where(finite, 0, state["skipped_in_a_row"] + 1)

        metrics = {"loss": loss, "gradient_norm": norm, "skipped": new["skipped"]}
        metrics |= {"skipped_in_a_row": new["skipped_in_a_row"], **seen}
        metrics |= {f"gradient_norm/{name}": value for name, value in group_norms(gradients, self.labels).items()}
        taken = step - state["skipped"]  # the schedule stands still with the parameters
        groups = all_groups(self.config).items()
        metrics |= {f"learning_rate/{name}": learning_rate(self.config, group)(taken) for name, group in groups}
        new = new if self.mesh is None else jax.lax.with_sharding_constraint(new, self.shardings(new))
        return new, self._replicate(metrics)

    def without_rematerialisation(self) -> "TrainStep":
        """The plain step on one device in one round, whose operations are the model's own: for counting them."""
        config = dataclasses.replace(self.config, rematerialisation="none", accumulation=1)
        return TrainStep(config, self.model, self.labels, None)

    def _draw(self, part: Batch, step: jax.Array) -> Draws:
        factor = self.model.vae.factor
        height, width = (side // factor for side in part["hq"].shape[1:3])
        shape = (height, width, self.model.vae.latent_channels)
        settings = self.config.seed, self.model.schedule.train_steps, self.config.noise_offset
        drawn = draw(settings[0], step, part["row"], shape, *settings[1:])
        if self.config.losses.guidance is not None:
            low, high = self.config.losses.guidance
            picked = jax.vmap(jax.random.bernoulli)(guidance_keys(settings[0], step, part["row"]))
            drawn = dataclasses.replace(drawn, guidance=jnp.where(picked, high, low).astype(jnp.float32))
        names = [field.name for field in dataclasses.fields(Draws)]
        return dataclasses.replace(drawn, **{name: part[name] for name in names if name in part})

    def _rounds(self, array: jax.Array) -> jax.Array:
        """(B, ...) -> (rounds, B / rounds, ...); samples that attend to each other stay together."""
        rounds, unit = self.config.accumulation, self.model.alignment.group or 1
        split = array.reshape(-1, rounds, unit, *array.shape[1:]).swapaxes(0, 1)
        return split.reshape(rounds, -1, *array.shape[1:])

    def _place(self, array: jax.Array) -> jax.Array:
        if self.mesh is None:
            return array
        placed: jax.Array = jax.lax.with_sharding_constraint(array, parameter_sharding(self.mesh, array.shape))
        return placed

    def _replicate(self, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if self.mesh is None:
            return metrics
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return {name: jax.lax.with_sharding_constraint(value, everywhere) for name, value in metrics.items()}
