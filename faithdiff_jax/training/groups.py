"""Which parameters train, in which group, and which are frozen: patterns that together cover every dotted path."""

import fnmatch
from collections.abc import Iterable, Mapping

from faithdiff_jax.errors import InputError
from faithdiff_jax.training.config import TrainConfig
from faithdiff_jax.training.lora import LORA_GROUP, adapter_paths

NAMED_AT_MOST = 5
# The VAE's latents are what the loss compares with, and autoencoder.py trains it; its decoder is part of the prediction
# where the loss is of pictures.
VAE, DECODER = "vae.", ("vae.decoder.", "vae.post_quant_conv.")


def assign_groups(config: TrainConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The group of every parameter that trains.

    Args:
        config: the run's groups, frozen patterns and LoRA.
        shapes: dotted path, part first -> shape, of every parameter of the model.

    Returns:
        Path -> group of each parameter that trains, including LoRA's own; all other paths are frozen.

    Raises:
        InputError: a pattern that matches nothing, a parameter in two groups or in none, or one that must stay frozen.
    """
    claims: dict[str, list[str]] = {path: [] for path in shapes}
    patterns = [
        (name, "groups." + name, pattern) for name, group in config.groups.items() for pattern in group.parameters
    ]
    patterns += [("", "frozen", pattern) for pattern in config.frozen]
    for group, key, pattern in patterns:
        matched = fnmatch.filter(shapes, pattern)
        if not matched:
            raise InputError(f"{key}: pattern {pattern!r} matches no parameter, such as {next(iter(shapes))}")
        for path in matched:
            if group not in claims[path]:
                claims[path].append(group)

    several = {path: groups for path, groups in claims.items() if len(groups) > 1}
    if several:
        path, groups = next(iter(several.items()))
        names = " and ".join(name or "frozen" for name in groups)
        raise InputError(f"{path}: claimed by {names}{_more(several)}; a parameter must be in one group, or frozen")
    none = [path for path, groups in claims.items() if not groups]
    if none:
        raise InputError(f"no group has {_listed(none)}: add a pattern to a group, or to frozen")
    trained = {path: groups[0] for path, groups in claims.items() if groups[0]}
    decoded = config.losses.in_pictures and config.distill is None
    vae = [path for path in trained if path.startswith(VAE) and not (decoded and path.startswith(DECODER))]
    if vae:
        which, frozen = ("VAE's encoder", "vae.encoder.* and vae.quant_conv.*") if decoded else ("VAE", "vae.*")
        raise InputError(
            f"group {trained[vae[0]]!r} has {_listed(vae)}: the {which} stays frozen, add {frozen} to frozen"
        )
    if config.lora is not None:
        trained |= dict.fromkeys(adapter_paths(config.lora, shapes, trained), LORA_GROUP)
    return trained


def _listed(paths: Iterable[str]) -> str:
    paths = list(paths)
    return ", ".join(paths[:NAMED_AT_MOST]) + (f" and {len(paths) - NAMED_AT_MOST} more" * (len(paths) > NAMED_AT_MOST))


def _more(paths: Mapping[str, object]) -> str:
    return f" (and {len(paths) - 1} more such)" if len(paths) > 1 else ""
