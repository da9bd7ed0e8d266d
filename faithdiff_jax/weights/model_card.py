"""The README.md of a model directory: what the Hugging Face hub shows as the model's card."""

import math
from collections.abc import Mapping

from faithdiff_jax.models.config import FaithDiffConfig
from faithdiff_jax.weights.safetensors_format import Spec

_CARD = """---
library_name: faithdiff-jax
pipeline_tag: image-to-image
tags:
- image-restoration
- super-resolution
- faithdiff
- jax
- flax
---

# {name}

A [FaithDiff](https://github.com/JyChen9811/FaithDiff) image restoration model for faithdiff-jax.

```python
from faithdiff_jax import FaithDiff

model = FaithDiff.load("{name}")  # the directory
restored = model.restore(image, "a caption of the picture")  # (h, w, 3) uint8
```

| Part | Parameters | Stored as |
|---|---:|---|
{parts}

The UNet predicts {prediction}. `config.yaml` states the architecture, the defaults of restoring, where the parameters
are from, and the SHA-256 of every file. The licence is that of the weights this model was made from.
"""
_PREDICTIONS = {"epsilon": "the noise", "v_prediction": "the velocity", "sample": "the clean latent"}


def model_card(name: str, config: FaithDiffConfig, parts: Mapping[str, Mapping[str, Spec]]) -> str:
    """Markdown with the YAML front matter of a model card.

    Args:
        name: of the directory.
        config: the architecture.
        parts: part name -> dotted path -> dtype and shape.
    """
    rows = []
    for part, specs in parts.items():
        count = sum(math.prod(shape) for _, shape in specs.values())
        dtypes = sorted({dtype.name for dtype, _ in specs.values()})
        rows.append(f"| `{part}` | {count:,} | {', '.join(dtypes)} |")
    return _CARD.format(name=name, parts="\n".join(rows), prediction=_PREDICTIONS[config.schedule.prediction])
