"""The number of files that a process may have open."""

import resource


def open_files_problem(needed: int) -> str | None:
    """Raises this process's limit to `needed` if it is lower; returns why it cannot."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return None
    if most != resource.RLIM_INFINITY and needed > most:
        return f"{needed} open files are needed, but the limit is {most}: raise it (`ulimit -n`)"
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    return None
