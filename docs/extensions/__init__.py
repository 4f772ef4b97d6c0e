"""What the documentation site is made with beyond Sphinx: pages of public names, docstrings as they are written here,
pages of studies as they were committed, and a check of links.
"""
