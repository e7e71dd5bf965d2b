"""How a training process ends: by a signal, with its launcher, or with the other ranks."""
