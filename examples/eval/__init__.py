"""How far a compressed cache moves next-token distributions, beside KIVI and TurboQuant-style references."""
