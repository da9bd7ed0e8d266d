"""What FaithDiff is compared with: bicubic, Real-ESRGAN, BSRGAN, BSRNet; each restores through `restorer.Restorer`."""
