"""What a part raises that cannot run here."""


class SkippedError(Exception):
    """Why."""
