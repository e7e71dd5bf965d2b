"""The one exception that a user's mistake raises, on every floor."""


class UserError(ValueError):
    """A mistake of the user, in one line "what: where; how to fix"; the command line prints it and exits with 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
