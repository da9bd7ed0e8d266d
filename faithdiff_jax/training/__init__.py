"""Joint training of LQ encoder, aligner and UNet on a device mesh."""
