"""The page's controls of options: each is made of what is known of its field, and read back as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from faithdiff_jax.inference.about import WHOLE_NUMBERS, About
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.service.forms import option_fields

GROUPS: Mapping[str, tuple[str, ...]] = {
    "": ("scale", "steps", "seed"),
    "Tiles": ("tile", "overlap", "vae_tile", "multiple", "stream_above"),
    "Colours": ("color_fix", "wavelet_levels"),
}
"""Title -> the options under it; those without a title are always seen."""
REST = "More options"
"""Of all others."""


def add_controls(options: RestoreOptions) -> dict[str, Any]:
    """Name -> control of every option that a request may choose, laid out where it is called."""
    import gradio as gr

    fields = option_fields()
    named = {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, REST: tuple(name for name in fields if name not in named)}
    made: dict[str, Any] = {}
    for title, names in groups.items():
        there = [name for name in names if name in fields]
        if not title:
            with gr.Row():
                made |= {name: _control(name, fields[name], options) for name in there}
            continue
        with gr.Accordion(title, open=False):
            made |= {name: _control(name, fields[name], options) for name in there}
    return {name: made[name] for name in fields}


def shown_values(options: RestoreOptions) -> list[Any]:
    """The value of each control, in the order of `option_fields`."""
    return [_shown(name, about, options) for name, about in option_fields().items()]


def texts_of(values: Sequence[Any]) -> dict[str, str]:
    """What the controls say, as the fields of a form; an empty one, where that is no text, is left out."""
    texts = {}
    for (name, about), value in zip(option_fields().items(), values, strict=True):
        if about.kind is bool:
            texts[name] = "true" if value else "false"
        elif about.kind is str:
            texts[name] = value or ""
        elif value not in (None, ""):
            whole = about.kind is int and isinstance(value, float) and value.is_integer()
            texts[name] = str(int(value) if whole else value)
    return texts


def _control(name: str, about: About, options: RestoreOptions) -> Any:
    import gradio as gr

    given = {
        "label": name.replace("_", " ").capitalize(),
        "value": _shown(name, about, options),
        "elem_id": f"option-{name}",
    }
    given["info"] = about.help if about.kind is str or about.kind is bool else f"{about.help}; {about.range}"
    if about.kind is bool:
        return gr.Checkbox(**given)
    if about.among:
        return gr.Dropdown(choices=list(about.among), **given)
    if about.kind in (int, float):
        return gr.Number(**given)  # the range is checked with all others, in the words of the command
    return gr.Textbox(max_lines=1, **given)


def _shown(name: str, about: About, options: RestoreOptions) -> Any:
    value = getattr(options, name)
    return ",".join(map(str, value or ())) if about.kind == WHOLE_NUMBERS else value
