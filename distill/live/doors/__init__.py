"""Doors for voice agents: each is one file, imported where it is asked for, with an extra for its library."""
