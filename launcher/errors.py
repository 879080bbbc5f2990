"""What a user did wrong when starting a run."""


class ConfigError(ValueError):
    """A run config that cannot work; the message has one line for each problem."""
