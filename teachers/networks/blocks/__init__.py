"""The transformer blocks of the backbones."""
