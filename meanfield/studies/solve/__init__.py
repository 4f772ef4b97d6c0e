"""The report of one solve."""
