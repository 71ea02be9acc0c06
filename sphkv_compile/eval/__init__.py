"""What a compressed cache costs a model, beside others at equal bytes: ``sphkv eval``."""
