"""The transformer blocks of the backbones, and how one reads audio."""
