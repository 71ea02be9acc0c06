"""How the ops reach Inductor."""
