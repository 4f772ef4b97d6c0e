"""Ends of a run at a place of the test's choice."""


def interrupt_at(moment):
    """For `limits.watched`: KeyboardInterrupt at the look of that number, from 0."""
    looks = iter(range(10**9))

    def look():
        if next(looks) == moment:
            raise KeyboardInterrupt

    return look
