"""DeepCache and T-GATE in PyTorch, written from the papers: the oracles for what steps take over from earlier ones.

Both work on diffusers' UNet from outside, by hooks on its modules. `tile` and `side` say what it is called for.
"""

from diffusers import UNet2DConditionModel


class DeepCache:
    """What the deep levels give to the finest ones is kept, and handed over where a step leaves them out.

    Ma et al. 2024, section 3.3, with the cut between two levels. Where the deep levels are left out they still run
    here; their result is thrown away.
    """

    def __init__(self, unet: UNet2DConditionModel, levels: int):
        self.tile = self.side = self.leave_out = None
        self.kept = {}
        # What enters the finest levels on their way up leaves the block before.
        self.handles = [unet.up_blocks[-levels - 1].register_forward_hook(self.take)]

    def take(self, module, arguments, output):
        if self.leave_out:
            return self.kept[self.tile, self.side]
        self.kept[self.tile, self.side] = output
        return None


class TGate:
    """Attention to the text: each layer's result is kept, and stands in the layer's place from the gate on.

    Zhang et al. 2024, section 4: what is kept is the mean over both sides of the guidance.
    """

    def __init__(self, unet: UNet2DConditionModel):
        self.tile, self.state = None, "attend"
        self.kept = {}
        self.handles = [
            module.register_forward_hook(self.take) for name, module in unet.named_modules() if name.endswith("attn2")
        ]

    def take(self, module, arguments, output):
        kept = self.kept.setdefault((self.tile, module), [])
        if self.state == "keep":
            kept.append(output)
        return sum(kept) / len(kept) if self.state == "frozen" else None
