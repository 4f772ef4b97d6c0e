"""The figures that the transfer study is for, from its tables."""

from __future__ import annotations
