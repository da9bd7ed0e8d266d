"""Second-order degradation of photographs: configuration, presets, and the operations."""
