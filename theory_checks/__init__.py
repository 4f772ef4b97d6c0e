"""Every claim of the theory measured, each with controls that must come out the other way: `python
-m theory_checks`.
"""
