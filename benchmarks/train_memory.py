"""Memory of a training step per device, from TPU's own compiler; no TPU is needed, only the package libtpu.

    pip install libtpu   # at the version that jax's extra `tpu` names
    TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-16 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu \\
        python benchmarks/train_memory.py --config configs/stage2.yaml --chips v5e-16 \\
        accumulation=4 mesh.data=1 mesh.fsdp=16

Nothing is computed: the full-size model's shapes are compiled for the chips' mesh, up to where the compiler has laid
out every buffer; the machine code, which takes it much longer, is not waited for. `--flops` alone prints the model
FLOPs of a step in seconds.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from tpu_compiler import assigned_bytes

from faithdiff_jax.config import from_dict, load
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.models.backend import trace_for
from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.sharding import batch_sharding
from faithdiff_jax.training.batch import abstract_batch, check_batch
from faithdiff_jax.training.config import TrainConfig, load_train_config
from faithdiff_jax.training.distillation import DistillStep, Teacher, teacher_options
from faithdiff_jax.training.groups import assign_groups
from faithdiff_jax.training.loop import step_flops
from faithdiff_jax.training.parameters import model_shapes, trained_shapes
from faithdiff_jax.training.step import TrainStep

# Name -> topology, chips, GiB of memory each. One chip of a v5p stands for an 80 GB GPU: it has 95 GB.
CHIPS = {
    "one-80gb": ("v5p:2x2x1", 1, 80e9 / 2**30),
    "one-24gb": ("v5p:2x2x1", 1, 24.0),
    "v5e-16": ("v5e:4x4", 16, 16.0),
    "v5e-256": ("v5e:16x16", 256, 16.0),
    "v6e-8": ("v6e:2x4", 8, 32.0),
}


def make_step(config: TrainConfig, model: FaithDiffConfig, labels: dict[str, str], mesh: Mesh | None) -> TrainStep:
    """The run's step; a teacher is the published model, with the published defaults."""
    if config.distill is None:
        return TrainStep(config, model, labels, mesh)
    published = FaithDiffConfig()
    negative_ids = tuple(np.zeros((1, encoder.positions), np.int32) for encoder in published.text_encoders)
    teacher = Teacher(published, teacher_options(config.distill, RestoreOptions()), negative_ids)
    return DistillStep(config, model, labels, mesh, teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/stage2.yaml")
    parser.add_argument("--model", help="a FaithDiffConfig's YAML; SDXL's size without it")
    parser.add_argument("--chips", choices=CHIPS, default="v5e-16")
    parser.add_argument("--flops", action="store_true", help="count the model FLOPs only")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()

    topology, count, limit = CHIPS[options.chips]
    config = load_train_config(options.config, ["data.sources=[{photos: none}]", *options.overrides])
    model = load(FaithDiffConfig, options.model) if options.model else from_dict(FaithDiffConfig, config.model, "model")
    shapes = model_shapes(model)
    labels = assign_groups(config, shapes)
    data = config.mesh.data if config.mesh.data > 0 else count // config.mesh.fsdp
    print(f"{options.config} {' '.join(options.overrides)} on {options.chips}, mesh {data} x {count // data}")
    trained = trained_shapes(config, shapes, labels)
    print(f"trained parameters    {sum(map(np.prod, trained.values())) / 1e6:10.1f} M")
    print(f"model FLOPs a step    {step_flops(make_step(config, model, labels, None), shapes) / 1e12:10.1f} TFLOP")
    if options.flops:
        return

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:count])
    mesh = Mesh(devices.reshape(data, -1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    check_batch(config, model, count, 1)
    step = make_step(config, model, labels, mesh)
    frozen = {path: jax.ShapeDtypeStruct(shape, step.dtype) for path, shape in step.frozen_shapes(shapes).items()}
    masters = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in trained.items()}

    def placed(tree):
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, step.shardings(tree)
        )

    rows = batch_sharding(mesh, config.batch)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows)
        for name, leaf in abstract_batch(config, model, config.batch).items()
    }
    begin = time.perf_counter()
    with trace_for("tpu"):
        lowered = step.run.lower(placed(jax.eval_shape(step.init, masters)), placed(frozen), batch)
    print(f"traced in             {time.perf_counter() - begin:10.0f} s", flush=True)
    begin = time.perf_counter()
    arguments, temporary = (size / 2**30 for size in assigned_bytes(lowered))
    used = arguments + temporary
    print(f"state and batch       {arguments:10.2f} GiB a device")
    print(f"temporary             {temporary:10.2f} GiB a device")
    print(
        f"together              {used:10.2f} GiB a device, of {limit:.1f}: {'fits' if used < limit else 'does not fit'}"
    )
    print(f"buffers assigned in   {time.perf_counter() - begin:10.0f} s", flush=True)
    os._exit(0)  # the compiler is still at work and cannot be told to stop


if __name__ == "__main__":
    main()
