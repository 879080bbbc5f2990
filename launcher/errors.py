"""What a user did wrong when starting a run."""


class ConfigError(ValueError):
    """A run config that cannot work; the message has one line for each problem."""


class LaunchError(ValueError):
    """Ranks that cannot be started; one line with what to do."""
