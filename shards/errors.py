"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """A message that names the value, the limit, the reason and the remedy; commands print it and exit with code 2."""
