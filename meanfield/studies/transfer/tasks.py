"""Tasks in sequence."""

METHODS: tuple[str, ...] = ()
